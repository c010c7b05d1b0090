//! Builds VMA archives of every legal shape, and of some that are not: clusters in any order,
//! extents of any length, gaps in the device ids, clusters left out or doubled.
//!
//! Written from the format's description and without any code of the driver, so that the two can't
//! be wrong in the same way.

use md5::{Digest, Md5};

use super::images::{Image, noise};

const BLOCK: usize = 4096;
const CLUSTER: u64 = 65_536;
const FIXED_HEADER: usize = 12_288;
const EXTENT_HEADER: usize = 512;

/// A device of an archive.
#[derive(Debug, Clone)]
pub struct Member {
    /// 1..=254.
    pub id: u8,
    /// Its name.
    pub name: String,
    /// Its content.
    pub image: Image,
}

/// An archive in the making.
#[derive(Debug, Clone)]
pub struct Archive {
    members: Vec<Member>,
    configs: Vec<(String, Vec<u8>)>,
    slots_per_extent: usize,
    shuffle: Option<u64>,
    left_out: Option<(u8, u32)>,
    doubled: Option<(u8, u32)>,
}

/// A built archive.
#[derive(Debug, Clone)]
pub struct Built {
    /// The file.
    pub bytes: Vec<u8>,
    /// Where its extent headers stand.
    pub extents: Vec<usize>,
}

impl Archive {
    /// An archive of these devices, with ids 1, 2, 3 …
    pub fn of<'a>(members: impl IntoIterator<Item = (&'a str, Image)>) -> Self {
        let members = members
            .into_iter()
            .zip(1..)
            .map(|((name, image), id)| Member { id, name: name.to_owned(), image })
            .collect();
        Self {
            members,
            configs: Vec::new(),
            slots_per_extent: 58,
            shuffle: None,
            left_out: None,
            doubled: None,
        }
    }

    /// Gives the devices these ids.
    #[must_use]
    pub fn ids(mut self, ids: &[u8]) -> Self {
        for (member, id) in self.members.iter_mut().zip(ids) {
            member.id = *id;
        }
        self
    }

    /// Adds a configuration.
    #[must_use]
    pub fn config(mut self, name: &str, data: &[u8]) -> Self {
        self.configs.push((name.to_owned(), data.to_vec()));
        self
    }

    /// Fills this many of an extent's 59 slots.
    #[must_use]
    pub fn slots_per_extent(mut self, slots: usize) -> Self {
        self.slots_per_extent = slots;
        self
    }

    /// Puts the clusters of all disks into an arbitrary order (a vmstate stream keeps its own).
    #[must_use]
    pub fn shuffled(mut self, seed: u64) -> Self {
        self.shuffle = Some(seed);
        self
    }

    /// Leaves a cluster out: not legal.
    #[must_use]
    pub fn without_cluster(mut self, id: u8, cluster: u32) -> Self {
        self.left_out = Some((id, cluster));
        self
    }

    /// Brings a cluster twice: not legal.
    #[must_use]
    pub fn with_cluster_twice(mut self, id: u8, cluster: u32) -> Self {
        self.doubled = Some((id, cluster));
        self
    }

    /// The file.
    pub fn build(&self) -> Built {
        let mut bytes = self.header();
        let uuid: [u8; 16] = bytes[8..24].try_into().unwrap();
        let mut extents = Vec::new();
        let slots = self.slots();
        for slots in slots.chunks(self.slots_per_extent) {
            extents.push(bytes.len());
            self.push_extent(&mut bytes, uuid, slots);
        }
        Built { bytes, extents }
    }

    fn slots(&self) -> Vec<(usize, u32)> {
        let mut slots = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            for cluster in 0..member.image.size.div_ceil(CLUSTER) as u32 {
                if self.left_out != Some((member.id, cluster)) {
                    slots.push((index, cluster));
                }
            }
        }
        if let Some(seed) = self.shuffle {
            // Sorting by noise is a shuffle; equal keys do no harm.
            let keys = noise(seed, slots.len() * 4);
            let mut keyed: Vec<_> = keys.chunks_exact(4).map(<[u8]>::to_vec).zip(slots).collect();
            keyed.sort();
            let in_order = |index: usize| self.members[index].name == "vmstate";
            slots = keyed.into_iter().map(|(_, slot)| slot).collect();
            let mut state: Vec<_> = slots.iter().filter(|slot| in_order(slot.0)).copied().collect();
            state.sort_unstable();
            let mut state = state.into_iter();
            for slot in slots.iter_mut().filter(|slot| in_order(slot.0)) {
                *slot = state.next().unwrap();
            }
        }
        if let Some((id, cluster)) = self.doubled {
            let index = self.members.iter().position(|member| member.id == id).unwrap();
            slots.push((index, cluster));
        }
        slots
    }

    fn header(&self) -> Vec<u8> {
        let mut blobs = vec![0u8];
        let mut push_blob = |data: &[u8]| {
            let at = blobs.len() as u32;
            blobs.extend((data.len() as u16).to_le_bytes());
            blobs.extend(data);
            at
        };
        let with_nul = |name: &str| [name.as_bytes(), &[0]].concat();
        let configs: Vec<(u32, u32)> =
            self.configs.iter().map(|(name, data)| (push_blob(&with_nul(name)), push_blob(data))).collect();
        let names: Vec<u32> = self.members.iter().map(|member| push_blob(&with_nul(&member.name))).collect();
        let header_size = (FIXED_HEADER + blobs.len()).next_multiple_of(512);
        let mut header = vec![0; header_size];
        header[..4].copy_from_slice(b"VMA\0");
        header[4..8].copy_from_slice(&1u32.to_be_bytes());
        header[8..24].copy_from_slice(&noise(99, 16));
        header[24..32].copy_from_slice(&1_790_000_000u64.to_be_bytes());
        header[48..52].copy_from_slice(&(FIXED_HEADER as u32).to_be_bytes());
        header[52..56].copy_from_slice(&(blobs.len() as u32).to_be_bytes());
        header[56..60].copy_from_slice(&(header_size as u32).to_be_bytes());
        for (i, (name, data)) in configs.iter().enumerate() {
            header[2044 + 4 * i..][..4].copy_from_slice(&name.to_be_bytes());
            header[3068 + 4 * i..][..4].copy_from_slice(&data.to_be_bytes());
        }
        for (member, name) in self.members.iter().zip(names) {
            let entry = &mut header[4096 + 32 * usize::from(member.id)..][..32];
            entry[..4].copy_from_slice(&name.to_be_bytes());
            entry[8..16].copy_from_slice(&member.image.size.to_be_bytes());
        }
        header[FIXED_HEADER..][..blobs.len()].copy_from_slice(&blobs);
        let digest = Md5::digest(&header);
        header[32..48].copy_from_slice(&digest);
        header
    }

    fn push_extent(&self, bytes: &mut Vec<u8>, uuid: [u8; 16], slots: &[(usize, u32)]) {
        let mut header = vec![0; EXTENT_HEADER];
        let mut data: Vec<u8> = Vec::new();
        header[..4].copy_from_slice(b"VMAE");
        header[8..24].copy_from_slice(&uuid);
        for (slot, (index, cluster)) in slots.iter().enumerate() {
            let member = &self.members[*index];
            let at = u64::from(*cluster) * CLUSTER;
            let content = member.image.read(at, CLUSTER as usize);
            let mut mask = 0u16;
            for (block, content) in content.chunks_exact(BLOCK).enumerate() {
                let inside = at + ((block * BLOCK) as u64) < member.image.size;
                if inside && (member.name == "vmstate" || content.iter().any(|byte| *byte != 0)) {
                    mask |= 1 << block;
                    data.extend(content);
                }
            }
            let entry = &mut header[40 + 8 * slot..][..8];
            entry[..2].copy_from_slice(&mask.to_be_bytes());
            entry[3] = member.id;
            entry[4..].copy_from_slice(&cluster.to_be_bytes());
        }
        header[6..8].copy_from_slice(&((data.len() / BLOCK) as u16).to_be_bytes());
        let digest = Md5::digest(&header);
        header[24..40].copy_from_slice(&digest);
        bytes.extend(header);
        bytes.extend(data);
    }
}
