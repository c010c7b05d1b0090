//! [`Guest`], what the partitions of a disk say about the guest on it.

use imgtool_core::Result;

use crate::glimpse::Sectors;
use crate::partitions::{PartitionKind, PartitionTable, Scheme, has_backup, read_inside};

/// Signature of an NTFS volume, from its fourth byte on.
const NTFS: &[u8; 8] = b"NTFS    ";

/// What the partitions of a disk say about the guest on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guest {
    /// Partition table, if there is one.
    pub table: Option<PartitionTable>,
    /// Size in bytes of the sectors that the guest sees.
    pub sector_size: u64,
    /// True if the disk has a start for a BIOS.
    pub boots_bios: bool,
    /// True if the disk has a start for UEFI.
    pub boots_uefi: bool,
    /// True if the disk is one of Windows.
    pub is_windows: bool,
    /// True if the backup header of the GPT is missing from the last sector, where guests look for it.
    pub lacks_backup: bool,
}

impl Guest {
    /// Looks at a disk with sectors of `sector_size` bytes.
    ///
    /// # Errors
    /// Any error of reading the disk.
    pub fn look(disk: &dyn Sectors, sector_size: u64) -> Result<Self> {
        let Some(table) = PartitionTable::read(disk, sector_size)? else {
            return Ok(Self { sector_size, ..Self::default() });
        };
        let boots_uefi = table.has(PartitionKind::EfiSystem);
        let boots_bios = match table.scheme {
            Scheme::Mbr => table.has_boot_code,
            // Windows writes the code although nothing of it starts so.
            Scheme::Gpt => table.has(PartitionKind::BiosBoot) || table.has_boot_code && !boots_uefi,
        };
        let mut is_windows = table.has(PartitionKind::MicrosoftReserved);
        for partition in table.partitions.iter().filter(|part| part.kind == PartitionKind::MicrosoftData) {
            let mut start = [0; 11];
            is_windows |= read_inside(disk, partition.start, &mut start)? && start[3..] == *NTFS;
        }
        let lacks_backup = table.scheme == Scheme::Gpt
            && (table.backup != disk.size().checked_sub(table.sector_size)
                || !has_backup(disk, table.sector_size)?);
        Ok(Self { table: Some(table), sector_size, boots_bios, boots_uefi, is_windows, lacks_backup })
    }

    /// True if the disk seems to hold data alone: an MBR with partitions of Windows, none of which is active.
    pub fn is_data(&self) -> bool {
        self.table.as_ref().is_some_and(|table| {
            let is_data = |kind| kind == PartitionKind::MicrosoftData;
            table.scheme == Scheme::Mbr
                && !table.is_active
                && !table.partitions.is_empty()
                && table.partitions.iter().all(|part| is_data(part.kind))
        })
    }

    /// True if the disk has a GPT.
    pub fn has_gpt(&self) -> bool {
        self.table.as_ref().is_some_and(|table| table.scheme == Scheme::Gpt)
    }

    /// Returns the size in bytes of the sectors by which the partition table counts, if the guest sees
    /// others: it will not find its partitions.
    pub fn foreign_sectors(&self) -> Option<u64> {
        self.table.as_ref().map(|table| table.sector_size).filter(|size| *size != self.sector_size)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::glimpse::tests::Bytes;

    /// Returns a disk of 1 MiB with a GPT of these types of partitions, each of which begins at 64 KiB.
    fn gpt(sector: usize, types: &[[u8; 16]]) -> Vec<u8> {
        let mut disk = vec![0; 1 << 20];
        disk[450] = 0xee;
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let last = disk.len() / sector - 1;
        for (at, other) in [(1, last), (last, 1)] {
            let header = &mut disk[at * sector..][..92];
            header[..8].copy_from_slice(b"EFI PART");
            header[32..40].copy_from_slice(&(other as u64).to_le_bytes());
            header[72..80].copy_from_slice(&2u64.to_le_bytes());
            header[80..84].copy_from_slice(&128u32.to_le_bytes());
            header[84..88].copy_from_slice(&128u32.to_le_bytes());
        }
        for (index, guid) in types.iter().enumerate() {
            let entry = &mut disk[2 * sector + index * 128..][..128];
            entry[..16].copy_from_slice(guid);
            entry[32..40].copy_from_slice(&(65536 / sector as u64).to_le_bytes());
        }
        disk
    }

    const ESP: [u8; 16] =
        [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
    const DATA: [u8; 16] =
        [0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7];

    fn look(disk: &[u8], sector_size: u64) -> Guest {
        Guest::look(&Bytes(disk), sector_size).unwrap()
    }

    #[test]
    fn firmware_follows_from_partitions_and_boot_code() {
        let with_code = |mut disk: Vec<u8>| {
            disk[0] = 0xeb;
            disk
        };
        let boots = |disk: &[u8]| (look(disk, 512).boots_bios, look(disk, 512).boots_uefi);
        assert_eq!(boots(&gpt(512, &[ESP])), (false, true));
        assert_eq!(boots(&with_code(gpt(512, &[ESP]))), (false, true));
        assert_eq!(boots(&with_code(gpt(512, &[ESP, *b"Hah!IdontNeedEFI"]))), (true, true));
        assert_eq!(boots(&gpt(512, &[DATA])), (false, false));
        let mut mbr = vec![0; 1 << 20];
        mbr[446] = 0x80;
        mbr[450] = 0x83;
        mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(boots(&mbr), (false, false));
        assert_eq!(boots(&with_code(mbr.clone())), (true, false));
        let is_data = |active: u8, kind: u8| {
            let mut disk = with_code(mbr.clone());
            (disk[446], disk[450]) = (active, kind);
            look(&disk, 512).is_data()
        };
        assert!(is_data(0, 7) && !is_data(0x80, 7) && !is_data(0, 0x83));
        mbr[450] = 0xef;
        assert_eq!(boots(&mbr), (false, true));
        assert_eq!(look(&mbr, 512).table.unwrap().scheme, Scheme::Mbr);
    }

    #[test]
    fn ends_and_sectors_of_a_gpt_are_compared_with_the_disk() {
        let mut disk = gpt(512, &[ESP]);
        assert!(!look(&disk, 512).lacks_backup);
        assert_eq!(look(&disk, 512).foreign_sectors(), None);
        assert_eq!(look(&disk, 4096).foreign_sectors(), Some(512));
        assert_eq!(look(&gpt(4096, &[ESP]), 512).foreign_sectors(), Some(4096));
        assert!(look(&disk[..disk.len() - 512], 512).lacks_backup);
        disk.resize(2 << 20, 0);
        assert!(look(&disk, 512).lacks_backup);
        let damaged = {
            let mut disk = gpt(512, &[ESP]);
            let end = disk.len();
            disk[end - 512..].fill(0);
            disk
        };
        assert!(look(&damaged, 512).lacks_backup);
    }

    #[test]
    fn windows_is_known_by_its_volumes() {
        let mut disk = gpt(512, &[ESP, DATA]);
        assert!(!look(&disk, 512).is_windows);
        disk[65536 + 3..65536 + 11].copy_from_slice(b"NTFS    ");
        assert!(look(&disk, 512).is_windows);
        let reserved =
            [0x16, 0xe3, 0xc9, 0xe3, 0x5c, 0x0b, 0xb8, 0x4d, 0x81, 0x7d, 0xf9, 0x2d, 0xf0, 0x02, 0x15, 0xae];
        assert!(look(&gpt(512, &[reserved]), 512).is_windows);
    }
}
