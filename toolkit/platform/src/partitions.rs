//! [`PartitionTable`], read from the first sectors of a disk: MBR or GPT. Nothing is trusted, and few sectors
//! are read.
//!
//! The GPT is that of UEFI 2.10, chapter 5.3; the MBR that of chapter 5.2.1. Checksums are not compared: the
//! table is looked at for hints, and the firmware compares them.

use imgtool_core::Result;

use crate::glimpse::Sectors;

/// Sizes in bytes of the sectors of disks in use.
pub(crate) const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// Maximum number of entries of a GPT. Our limit: programs write 128.
const MAX_ENTRIES: u32 = 128;

/// Length in bytes of an entry of a GPT. Programs write no longer ones.
const ENTRY_LEN: usize = 128;

/// Signature of a GPT header.
const GPT_SIGNATURE: &[u8; 8] = b"EFI PART";

/// Type GUIDs of partitions, as they are stored.
const TYPES: [([u8; 16], PartitionKind); 4] = [
    (
        [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b],
        PartitionKind::EfiSystem,
    ),
    (*b"Hah!IdontNeedEFI", PartitionKind::BiosBoot),
    (
        [0x16, 0xe3, 0xc9, 0xe3, 0x5c, 0x0b, 0xb8, 0x4d, 0x81, 0x7d, 0xf9, 0x2d, 0xf0, 0x02, 0x15, 0xae],
        PartitionKind::MicrosoftReserved,
    ),
    (
        [0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7],
        PartitionKind::MicrosoftData,
    ),
];

/// Kind of a partition table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Master boot record.
    Mbr,
    /// GUID partition table.
    Gpt,
}

/// Kind of a partition, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartitionKind {
    /// EFI system partition.
    EfiSystem,
    /// BIOS boot partition of GRUB.
    BiosBoot,
    /// Reserved partition of Windows.
    MicrosoftReserved,
    /// Data of Windows (GPT), or NTFS or exFAT (MBR).
    MicrosoftData,
    /// Any other.
    Other,
}

/// A partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Position of the first byte.
    pub start: u64,
    /// Kind.
    pub kind: PartitionKind,
}

/// A partition table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionTable {
    /// Kind of the table.
    pub scheme: Scheme,
    /// Size in bytes of the sectors by which the table counts. Of an MBR it is unknown, and assumed to be the
    /// disk's.
    pub sector_size: u64,
    /// Partitions, in the order of the table.
    pub partitions: Vec<Partition>,
    /// True if the first sector has code for a BIOS.
    pub has_boot_code: bool,
    /// True if a partition of the MBR is marked as active.
    pub is_active: bool,
    /// Position in bytes of the backup header, as the GPT states it.
    pub backup: Option<u64>,
}

impl PartitionTable {
    /// Reads the table of a disk with sectors of `sector_size` bytes; `None` if there is none.
    ///
    /// # Errors
    /// Any error of reading the disk.
    pub fn read(disk: &dyn Sectors, sector_size: u64) -> Result<Option<Self>> {
        let mut first = [0; 512];
        if !read_inside(disk, 0, &mut first)? {
            return Ok(None);
        }
        let Some(mbr) = Self::of_mbr(&first, sector_size) else { return Ok(None) };
        let others = SECTOR_SIZES.into_iter().filter(|size| *size != sector_size);
        for size in std::iter::once(sector_size).chain(others) {
            if let Some(gpt) = Self::of_gpt(disk, size)? {
                let Self { has_boot_code, is_active, .. } = mbr;
                return Ok(Some(Self { has_boot_code, is_active, ..gpt }));
            }
        }
        // Only the protection is left of a table that is gone.
        Ok(Some(mbr).filter(|mbr| !mbr.partitions.is_empty()))
    }

    /// Parses the first sector.
    fn of_mbr(sector: &[u8; 512], sector_size: u64) -> Option<Self> {
        if sector[510..] != [0x55, 0xaa] {
            return None;
        }
        let entries = || sector[446..510].chunks_exact(16);
        // The boot sector of a file system has the same signature, and other bytes here.
        if entries().any(|entry| entry[0] & 0x7f != 0) || entries().all(|entry| entry[4] == 0) {
            return None;
        }
        let mut partitions = Vec::new();
        for entry in entries() {
            let start = u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]);
            let kind = match entry[4] {
                // Empty, and the protection of a GPT.
                0 | 0xee => continue,
                0xef => PartitionKind::EfiSystem,
                0x07 => PartitionKind::MicrosoftData,
                _ => PartitionKind::Other,
            };
            partitions.push(Partition { start: u64::from(start).saturating_mul(sector_size), kind });
        }
        Some(Self {
            scheme: Scheme::Mbr,
            sector_size,
            partitions,
            // The code ends before the disk's signature.
            has_boot_code: sector[..440].iter().any(|byte| *byte != 0),
            is_active: entries().any(|entry| entry[0] == 0x80),
            backup: None,
        })
    }

    /// Reads a GPT that counts by sectors of this size; `None` if there is none.
    fn of_gpt(disk: &dyn Sectors, sector_size: u64) -> Result<Option<Self>> {
        let mut header = [0; 92];
        if !read_inside(disk, sector_size, &mut header)? || !header.starts_with(GPT_SIGNATURE) {
            return Ok(None);
        }
        let long = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let int = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let mut partitions = Vec::new();
        let count = int(80).min(MAX_ENTRIES) as usize;
        // At most 16 KiB.
        let mut entries = vec![0; count * ENTRY_LEN];
        let at = long(72).saturating_mul(sector_size);
        if int(84) == 128 && read_inside(disk, at, &mut entries)? {
            for entry in entries.chunks_exact(ENTRY_LEN).filter(|entry| entry[..16] != [0; 16]) {
                let first = entry[32..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                let kind = TYPES.iter().find(|(guid, _)| entry.starts_with(guid));
                let kind = kind.map_or(PartitionKind::Other, |(_, kind)| *kind);
                partitions.push(Partition { start: first.saturating_mul(sector_size), kind });
            }
        }
        Ok(Some(Self {
            scheme: Scheme::Gpt,
            sector_size,
            partitions,
            has_boot_code: false,
            is_active: false,
            backup: Some(long(32).saturating_mul(sector_size)),
        }))
    }

    /// True if the table has a partition of this kind.
    pub fn has(&self, kind: PartitionKind) -> bool {
        self.partitions.iter().any(|partition| partition.kind == kind)
    }
}

/// True if a backup header of a GPT is in the last sector of a disk with sectors of this size.
///
/// # Errors
/// Any error of reading the disk.
pub(crate) fn has_backup(disk: &dyn Sectors, sector_size: u64) -> Result<bool> {
    let mut signature = [0; 8];
    let Some(last) = disk.size().checked_sub(sector_size) else { return Ok(false) };
    Ok(read_inside(disk, last, &mut signature)? && signature == *GPT_SIGNATURE)
}

/// Fills `buf`, if all of it is on the disk. Returns false otherwise.
pub(crate) fn read_inside(disk: &dyn Sectors, start: u64, buf: &mut [u8]) -> Result<bool> {
    let is_inside = start.checked_add(buf.len() as u64).is_some_and(|end| end <= disk.size());
    if is_inside {
        disk.read(buf, start)?;
    }
    Ok(is_inside)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::glimpse::tests::Bytes;

    #[test]
    fn signatures_alone_are_no_table() {
        let mut disk = vec![0; 1 << 16];
        assert_eq!(PartitionTable::read(&Bytes(&disk), 512).unwrap(), None);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(PartitionTable::read(&Bytes(&disk), 512).unwrap(), None);
        // A boot sector of FAT has text where the entries would be.
        disk[446..460].copy_from_slice(b"Remove disks. ");
        assert_eq!(PartitionTable::read(&Bytes(&disk), 512).unwrap(), None);
        assert_eq!(PartitionTable::read(&Bytes(&[]), 512).unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_looked_at(
            mut disk in proptest::collection::vec(any::<u8>(), 0..9000),
            is_gpt in any::<bool>(),
            at in prop_oneof![Just(512usize), Just(4096)],
        ) {
            if is_gpt && disk.len() > at + 92 {
                disk[446..510].fill(0);
                disk[450] = 0xee;
                disk[510..512].copy_from_slice(&[0x55, 0xaa]);
                disk[at..at + 8].copy_from_slice(b"EFI PART");
                disk[at + 84..at + 88].copy_from_slice(&128u32.to_le_bytes());
            }
            let disk = Bytes(&disk);
            let table = PartitionTable::read(&disk, 512).unwrap();
            prop_assert!(table.is_none_or(|table| table.partitions.len() <= MAX_ENTRIES as usize));
            prop_assert!(crate::Guest::look(&disk, 512).is_ok());
        }
    }
}
