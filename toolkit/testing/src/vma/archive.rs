//! Archives of disk images, with clusters in any order, extents of any length, gaps in the device ids, and
//! clusters left out or doubled.

use super::{ArchiveBuilder, BLOCK, CLUSTER, Slot, slot};
use crate::images::{Image, noise};

/// A device of an archive.
#[derive(Debug, Clone)]
struct Member {
    /// Device id, 1 to 254.
    id: u8,
    name: String,
    image: Image,
}

impl Member {
    /// Returns the slot of a cluster. Sub-blocks of zeros are not stored, except in the state of a guest.
    fn slot(&self, cluster: u32) -> Slot {
        let start = u64::from(cluster) * CLUSTER as u64;
        let content = self.image.read(start, CLUSTER);
        let mut mask = 0;
        for (block, content) in content.chunks_exact(BLOCK).enumerate() {
            let inside = start + ((block * BLOCK) as u64) < self.image.size;
            if inside && (self.name == "vmstate" || content.iter().any(|byte| *byte != 0)) {
                mask |= 1 << block;
            }
        }
        slot(self.id, cluster, mask)
    }
}

/// An archive to build from disk images.
#[derive(Debug, Clone)]
pub struct Archive {
    members: Vec<Member>,
    configs: Vec<(String, Vec<u8>)>,
    slots_per_extent: usize,
    shuffle: Option<u64>,
    interleaved: bool,
    left_out: Option<(u8, u32)>,
    doubled: Option<(u8, u32)>,
}

/// A finished archive.
#[derive(Debug, Clone)]
pub struct Built {
    /// Bytes of the file.
    pub bytes: Vec<u8>,
    /// File offsets of the extent headers.
    pub extents: Vec<usize>,
}

impl Archive {
    /// Begins an archive of these devices, with ids 1, 2, 3 …
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
            interleaved: false,
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

    /// Fills `slots` of the 59 slots of each extent.
    #[must_use]
    pub fn slots_per_extent(mut self, slots: usize) -> Self {
        self.slots_per_extent = slots;
        self
    }

    /// Shuffles the clusters of all disks. A vmstate stays in order.
    #[must_use]
    pub fn shuffled(mut self, seed: u64) -> Self {
        self.shuffle = Some(seed);
        self
    }

    /// Takes the clusters from all disks in turn. Each disk stays in order.
    #[must_use]
    pub fn interleaved(mut self) -> Self {
        self.interleaved = true;
        self
    }

    /// Leaves a cluster out, which is invalid.
    #[must_use]
    pub fn without_cluster(mut self, id: u8, cluster: u32) -> Self {
        self.left_out = Some((id, cluster));
        self
    }

    /// Stores a cluster twice, which is invalid.
    #[must_use]
    pub fn with_cluster_twice(mut self, id: u8, cluster: u32) -> Self {
        self.doubled = Some((id, cluster));
        self
    }

    /// Builds the archive.
    pub fn build(&self) -> Built {
        let mut builder = ArchiveBuilder::new();
        for (name, data) in &self.configs {
            builder = builder.config(name, data);
        }
        for member in &self.members {
            builder = builder.device_of(member.id, &member.name, member.image.clone());
        }
        let slots: Vec<Slot> =
            self.order().into_iter().map(|(index, cluster)| self.members[index].slot(cluster)).collect();
        builder.extents(&slots, self.slots_per_extent).built()
    }

    /// Returns the member index and the cluster number of each slot, in the order of the file.
    fn order(&self) -> Vec<(usize, u32)> {
        let mut slots = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            for cluster in 0..member.image.size.div_ceil(CLUSTER as u64) as u32 {
                if self.left_out != Some((member.id, cluster)) {
                    slots.push((index, cluster));
                }
            }
        }
        if self.interleaved {
            slots.sort_by_key(|(index, cluster)| (*cluster, *index));
        }
        if let Some(seed) = self.shuffle {
            // Sorting by random keys shuffles the slots; equal keys do no harm.
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
}
