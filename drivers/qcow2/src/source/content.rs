//! Guest data of an image: clusters of the image or its external data file, and the backing image.

use std::ops::Range;

use imgtool_core::{Disk, Error, ExtentKind, ExtentList, FileRun, Losses, OpenOptions, RandomInput, Result};

use crate::compressed::Decoder;
use crate::encryption::DataCipher;
use crate::layout::MAX_L1_BYTES;
use crate::layout::entry::Shape;
use crate::layout::header::{CompressionType, Encryption, Header, INCOMPATIBLE_DATA_FILE};
use crate::layout::snapshot::Snapshot;
use crate::layout::table::check_table;
use crate::mapping::{Mapping, RunKind};

/// Guest data of one state of an image: the active one or a snapshot.
pub(super) struct Content {
    pub(super) mapping: Mapping,
    decoder: Decoder,
    /// Cipher of the data clusters; `None` if they are not encrypted.
    cipher: Option<DataCipher>,
    /// True if the data clusters are encrypted, unlocked or not.
    pub(super) is_encrypted: bool,
    /// File that stores the guest data: the image itself or its external data file.
    pub(super) data: RandomInput,
    /// Disk of the backing image, which may be smaller or larger than this disk.
    pub(super) backing: Option<Disk>,
    /// Guest ranges that salvage could not recover; `None` without salvage.
    pub(super) losses: Option<Losses>,
}

impl Content {
    /// Opens the data of `snapshot`, or of the active state, as a disk of `virtual_size` bytes.
    pub(super) fn open(
        input: &RandomInput,
        header: &Header,
        snapshot: Option<&Snapshot>,
        virtual_size: u64,
        options: &OpenOptions,
    ) -> Result<Self> {
        // A passphrase is checked, and the other files opened, before any large read.
        let cipher = DataCipher::unlock(input, header, options)?;
        let data = open_data_file(input, header, options)?;
        let backing = open_backing(input, header, options)?;
        let (l1_offset, l1_entries) = match snapshot {
            Some(snapshot) => (snapshot.l1_offset, snapshot.l1_entries),
            None => (header.l1_offset, header.l1_entries),
        };
        let needed = header.shape.l1_entries(virtual_size);
        if u64::from(l1_entries) < needed {
            return Err(Error::malformed(format!(
                "the snapshot's L1 table has {l1_entries} entries, but {virtual_size} bytes of disk need {needed}"
            )));
        }
        // Entries past the end of the disk map the saved machine state.
        let l1_entries = l1_entries.min(u32::try_from(needed).unwrap_or(u32::MAX));
        check_table(
            "the L1 table",
            l1_offset,
            u64::from(l1_entries) * 8,
            MAX_L1_BYTES,
            header.shape.cluster_size(),
            40,
        )?;
        let mapping = Mapping::read(
            input.clone(),
            header.shape,
            header.version,
            header.has(INCOMPATIBLE_DATA_FILE),
            l1_offset,
            l1_entries,
            options.externals.depth(),
            &options.memory,
        )?;
        let compression = header.compression.unwrap_or(CompressionType::Zlib);
        let decoder = Decoder::new(
            compression,
            header.shape.cluster_size(),
            options.externals.depth(),
            &options.memory,
        )?;
        let losses = options.salvage.then(Losses::default);
        let is_encrypted = header.encryption != Encryption::None;
        Ok(Self { mapping, decoder, cipher, is_encrypted, data, backing, losses })
    }

    /// Returns the memory in bytes that a reader needs besides its buffer.
    pub(super) fn reader_memory(&self) -> u64 {
        self.decoder.context_memory().max(self.backing.as_ref().map_or(0, Disk::reader_memory))
    }

    /// Fills `buf` from a run that starts at `guest_offset`.
    pub(super) fn read_run(
        &self,
        input: &RandomInput,
        kind: RunKind,
        shape: Shape,
        buf: &mut [u8],
        guest_offset: u64,
    ) -> Result<()> {
        match kind {
            RunKind::Zero { .. } => buf.fill(0),
            RunKind::Unallocated { .. } => self.read_backing(buf, guest_offset)?,
            // The offset fits in usize: a cluster has at most 2 MiB.
            RunKind::Compressed(range) => {
                self.decoder.read(input, range, buf, shape.within_cluster(guest_offset) as usize)?;
            }
            RunKind::Data { host_offset } => self.read_data(buf, host_offset, guest_offset)?,
        }
        Ok(())
    }

    /// Fills `buf` from data clusters.
    fn read_data(&self, buf: &mut [u8], host_offset: u64, guest_offset: u64) -> Result<()> {
        match &self.cipher {
            None if self.is_encrypted => Err(Error::usage("the image was opened without its content")),
            None => self.data.read_exact_at(buf, host_offset),
            Some(cipher) => cipher.read(&self.data, buf, host_offset, guest_offset, None),
        }
    }

    /// Fills `buf` from damaged data clusters: bytes that can't be read become zeros and are recorded.
    pub(super) fn salvage_data(&self, buf: &mut [u8], host_offset: u64, guest_offset: u64, losses: &Losses) {
        let Some(cipher) = &self.cipher else {
            return self.data.read_salvage(buf, host_offset, |lost, e| {
                losses.add(guest_offset + lost.start as u64..guest_offset + lost.end as u64, &e);
            });
        };
        let guest = guest_offset..guest_offset + buf.len() as u64;
        if let Err(e) = cipher.read(&self.data, buf, host_offset, guest_offset, Some(losses)) {
            buf.fill(0);
            losses.add(guest, &e);
        }
    }

    /// Fills `buf` from the backing image, and with zeros past its end.
    fn read_backing(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let Some(backing) = &self.backing else {
            buf.fill(0);
            return Ok(());
        };
        let covered = backing.size().saturating_sub(guest_offset).min(buf.len() as u64);
        // At most the buffer's length.
        let (below, beyond) = buf.split_at_mut(covered as usize);
        beyond.fill(0);
        if below.is_empty() { Ok(()) } else { backing.read_at(below, guest_offset) }
    }

    /// Appends the extents of data clusters. Holes in the file, left by clusters that were preallocated but
    /// never written, count as zeros.
    pub(super) fn push_data(
        &self,
        list: &mut ExtentList,
        guest_offset: u64,
        host_offset: u64,
        len: u64,
        resolution: Option<u64>,
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let host = host_offset + done;
            // A hole of an encrypted image decrypts to noise, which is data.
            let (run_end, is_data) = if host < self.data.len() && !self.is_encrypted {
                let run = self.file_run(host, guest_offset + done, resolution)?;
                (run.end, run.is_data)
            } else {
                // Past the end of the file, report data: reading it fails.
                (u64::MAX, true)
            };
            let part = (len - done).min(run_end.saturating_sub(host).max(1));
            list.push(guest_offset + done, part, if is_data { ExtentKind::Data } else { ExtentKind::Zero });
            done += part;
        }
        Ok(())
    }

    /// Returns the run of the file at `host_offset`, which stores the guest byte at `guest_offset`.
    fn file_run(&self, host_offset: u64, guest_offset: u64, resolution: Option<u64>) -> Result<FileRun> {
        match resolution {
            Some(resolution) => {
                let to_boundary = resolution - guest_offset % resolution;
                self.data.rough_run(host_offset, host_offset.saturating_add(to_boundary))
            }
            None => self.data.run(host_offset),
        }
    }

    /// Appends the extents that the backing image has in an unallocated range. Returns the guest offset at
    /// which they end.
    pub(super) fn push_backing(
        &self,
        list: &mut ExtentList,
        range: Range<u64>,
        resolution: Option<u64>,
    ) -> Result<u64> {
        let covering = self.backing.as_ref().filter(|backing| range.start < backing.size());
        let Some(backing) = covering else {
            list.push(range.start, range.end - range.start, ExtentKind::Hole);
            return Ok(range.end);
        };
        let covered = range.start..range.end.min(backing.size());
        let mut reached = range.start;
        let extents = match resolution {
            Some(resolution) => backing.rough_extents(covered, resolution)?,
            None => backing.extents(covered)?,
        };
        for extent in extents {
            list.push(extent.start, extent.len, extent.kind);
            reached = extent.end();
        }
        Ok(reached)
    }
}

/// Opens the file that stores the guest data: the external data file, or the image itself if it has none.
fn open_data_file(input: &RandomInput, header: &Header, options: &OpenOptions) -> Result<RandomInput> {
    if !header.has(INCOMPATIBLE_DATA_FILE) {
        return Ok(input.clone());
    }
    let Some(name) = &header.extensions.data_file else {
        return Err(Error::unsupported("the image does not name its external data file"));
    };
    options.externals.open_file("data file", name, input.location())?.into_random()
}

fn open_backing(input: &RandomInput, header: &Header, options: &OpenOptions) -> Result<Option<Disk>> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    let format = header.extensions.backing_format.as_deref();
    let image = options.externals.open_image("backing file", name, input.location(), format, options)?;
    Disk::only(image, "the backing image").map(Some)
}
