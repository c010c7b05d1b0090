//! Content of files, known by its first bytes: what a raw disk holds, and what is no disk at all.

use imgtool_core::input::PROBE_LEN;
use imgtool_core::zero::is_zero;
use imgtool_core::{RandomInput, Result};

/// Kind of a file that is no disk image.
pub(crate) struct NoDisk {
    /// What it is, for messages.
    pub(crate) name: &'static str,
    /// What a user can do instead.
    pub(crate) advice: &'static str,
    /// Magic numbers: file offset and bytes. One match suffices.
    magics: &'static [Magic],
}

type Magic = (usize, &'static [u8]);

/// Recognises a kind of file without a magic number by its first bytes.
type Test = fn(&[u8]) -> bool;

const UNPACK: &str = "unpack it, and convert the disk images in it";
const DECOMPRESS: &str = "pipe it in through its own program";
const RESTORE: &str = "restore it with the program that made it";
const NOTHING: &str = "check the name";

/// Files that users take for disk images, and the most common others. No disk begins like one of them, unless a
/// guest uses it without partitions to store such a file.
const NO_DISKS: [NoDisk; 30] = [
    no_disk(
        "a zip archive",
        "with a name that ends in .zip, the disks in it are read",
        &[(0, b"PK\x03\x04"), (0, b"PK\x05\x06"), (0, b"PK\x07\x08")],
    ),
    no_disk("a 7z archive", UNPACK, &[(0, b"7z\xbc\xaf\x27\x1c")]),
    no_disk("a rar archive", UNPACK, &[(0, b"Rar!\x1a\x07")]),
    no_disk("a xar archive", UNPACK, &[(0, b"xar!")]),
    no_disk("a cabinet archive", UNPACK, &[(0, b"MSCF\0\0\0\0")]),
    no_disk("a WIM archive", UNPACK, &[(0, b"MSWIM\0\0\0")]),
    no_disk("a cpio archive", UNPACK, &[(0, b"070701"), (0, b"070702"), (0, b"070707")]),
    no_disk("an ar archive or Debian package", UNPACK, &[(0, b"!<arch>\n")]),
    no_disk("an RPM package", UNPACK, &[(0, b"\xed\xab\xee\xdb")]),
    no_disk("an lz4 file", DECOMPRESS, &[(0, b"\x04\x22\x4d\x18")]),
    no_disk("an lzip file", DECOMPRESS, &[(0, b"LZIP\x01")]),
    no_disk("an lrzip file", DECOMPRESS, &[(0, b"LRZI")]),
    no_disk("a partclone image", RESTORE, &[(0, b"partclone-image")]),
    no_disk("a Partimage file", RESTORE, &[(0, b"PaRtImAgE-VoLuMe")]),
    no_disk("an FSArchiver file", RESTORE, &[(0, b"FsArCh_0")]),
    no_disk("an ntfsclone image", RESTORE, &[(0, b"\0ntfsclone-image")]),
    no_disk("an EnCase image", "ewfexport writes it as a raw disk", &[(0, b"EVF\x09\x0d\x0a\xff\0")]),
    no_disk("an AFF image", "affconvert writes it as a raw disk", &[(0, b"AFF10\x0d\x0a\0")]),
    no_disk("a sparse image of Bochs", "bximage converts it to a flat image", &[(0, b"\xce\x8a\x46\x02")]),
    no_disk("a sparse image of Android", "simg2img writes it as a raw disk", &[(0, b"\x3a\xff\x26\xed")]),
    no_disk("a sparse image of macOS", "hdiutil converts it to UDIF, a .dmg file", &[(0, b"sprs")]),
    no_disk(
        "a LUKS encrypted disk",
        "qemu-img can decrypt it; without that the result is as encrypted as it is",
        &[(0, b"LUKS\xba\xbe")],
    ),
    no_disk("the saved state of a QEMU machine", NOTHING, &[(0, b"QEVM\0\0\0")]),
    no_disk("an XML document", "convert the disk images that it names", &[(0, b"<?xml ")]),
    no_disk(
        "a web page",
        "a server may have answered with an error: check the download",
        &[(0, b"<!DOCTYPE html"), (0, b"<!doctype html"), (0, b"<html")],
    ),
    no_disk("a PDF document", NOTHING, &[(0, b"%PDF-")]),
    no_disk("a picture", NOTHING, &[(0, b"\x89PNG\r\n\x1a\n"), (0, b"\xff\xd8\xff"), (0, b"GIF8")]),
    no_disk("an SQLite database", NOTHING, &[(0, b"SQLite format 3\0")]),
    no_disk("an MSI package or old Office document", NOTHING, &[(0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")]),
    no_disk("an ELF program", NOTHING, &[(0, b"\x7fELF")]),
];

const PROGRAM: NoDisk = no_disk("a Windows program", NOTHING, &[]);
const TAR: NoDisk = no_disk(
    "a tar archive",
    "with a name that ends in .tar or .ova, the disks in it are read",
    &[(257, b"ustar\x0000"), (257, b"ustar  \0")],
);
const COMPRESS: NoDisk = no_disk("a file of compress(1)", DECOMPRESS, &[]);
const LZMA: NoDisk = no_disk("an lzma file", DECOMPRESS, &[]);

const fn no_disk(name: &'static str, advice: &'static str, magics: &'static [Magic]) -> NoDisk {
    NoDisk { name, advice, magics }
}

/// Recognises a file that is no disk image by its first bytes.
pub(crate) fn no_disk_by_head(head: &[u8]) -> Option<&'static NoDisk> {
    let tests: [(&NoDisk, Test); 4] =
        [(&PROGRAM, is_windows_program), (&TAR, is_old_tar), (&COMPRESS, is_compress), (&LZMA, is_lzma)];
    let found = tests.into_iter().find(|(_, fits)| fits(head)).map(|(known, _)| known);
    let has_magic = |known: &&NoDisk| known.magics.iter().any(|magic| has(head, 0, magic));
    found.or_else(|| [&TAR].into_iter().chain(&NO_DISKS).find(has_magic))
}

/// Returns the name of the descriptor of a VMDK disk from that of the file with its bytes: `d.vmdk` for
/// `d-flat.vmdk` and `d-f001.vmdk`.
pub(crate) fn descriptor_of(file_name: &str) -> Option<String> {
    let (stem, part) = file_name.strip_suffix(".vmdk")?.rsplit_once('-')?;
    let digits = part.strip_prefix('f').filter(|number| number.len() == 3);
    let is_number = digits.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
    (!stem.is_empty() && (part == "flat" || is_number)).then(|| format!("{stem}.vmdk"))
}

/// True if `bytes`, which begin at the file offset `start`, contain the magic number.
fn has(bytes: &[u8], start: usize, (at, magic): &Magic) -> bool {
    at.checked_sub(start).and_then(|at| bytes.get(at..)).is_some_and(|rest| rest.starts_with(magic))
}

/// True for a program of Windows, except for a Linux kernel that firmware can start: it is a boot sector,
/// too.
fn is_windows_program(head: &[u8]) -> bool {
    let header = head.get(60..64).and_then(|at| at.try_into().ok()).map(u32::from_le_bytes);
    let header = header.and_then(|at| usize::try_from(at).ok()).and_then(|at| head.get(at..));
    head.starts_with(b"MZ")
        && !is_boot_sector(head)
        && header.is_some_and(|header| header.starts_with(b"PE\0\0"))
}

fn is_boot_sector(head: &[u8]) -> bool {
    has(head, 0, &(510, b"\x55\xaa"))
}

/// True for an archive of a tar(1) before POSIX, which has no magic number: the checksum of its first header is
/// right. The sum of all bytes of a header counts its own field as blanks.
fn is_old_tar(head: &[u8]) -> bool {
    const FIELD: std::ops::Range<usize> = 148..156;
    let Some(header) = head.get(..512).filter(|header| header[0] != 0) else { return false };
    let counted = |(at, byte): (usize, &u8)| u64::from(if FIELD.contains(&at) { b' ' } else { *byte });
    let sum: u64 = header.iter().enumerate().map(counted).sum();
    let text = std::str::from_utf8(&header[FIELD]).unwrap_or_default();
    let digits = text.trim_matches(['\0', ' ']);
    u64::from_str_radix(digits, 8) == Ok(sum)
}

/// True for a file of compress(1): its magic number, and a byte with the maximum number of bits of a code, 9 to 16.
fn is_compress(head: &[u8]) -> bool {
    let has_bits = |flags: &u8| (9..=16).contains(&(flags & 0x1f)) && flags & 0x60 == 0;
    head.starts_with(b"\x1f\x9d") && head.get(2).is_some_and(has_bits) && !is_boot_sector(head)
}

/// True for a file of the old format of LZMA, which has no magic number: the properties that every program writes, a
/// dictionary of 2^n or 3 · 2^n bytes, and an unknown or plausible length.
fn is_lzma(head: &[u8]) -> bool {
    /// Longest plausible content. Our choice: no disk in an lzma file is longer.
    const LONGEST: u64 = 1 << 48;
    let Some((dictionary, rest)) = head.strip_prefix(b"\x5d").and_then(<[u8]>::split_first_chunk) else {
        return false;
    };
    let dictionary = u32::from_le_bytes(*dictionary);
    let is_usual = matches!(dictionary.wrapping_shr(dictionary.trailing_zeros()), 1 | 3);
    let len = rest.first_chunk().map(|len| u64::from_le_bytes(*len));
    let is_plausible = len.is_some_and(|len| len == u64::MAX || (1..LONGEST).contains(&len));
    dictionary >= 1 << 12 && is_usual && is_plausible && !is_boot_sector(head)
}

/// What a raw disk begins with: partition tables, file systems, volumes, firmware variables.
const DISK_CONTENTS: [Magic; 43] = [
    (510, b"\x55\xaa"), // MBR, boot sector of FAT and NTFS
    (512, b"EFI PART"),
    (4096, b"EFI PART"), // sectors of 4 KiB
    (0, b"ER\x02\x00"),  // Apple partition map
    (508, b"\xda\xbe"),  // Sun label
    (512, b"\x57\x45\x56\x82"),
    (64, b"\x57\x45\x56\x82"), // BSD label
    (1080, b"\x53\xef"),       // ext2, ext3, ext4
    (0, b"XFSB"),
    (65_600, b"_BHRfS_M"), // btrfs
    (32_769, b"CD001"),    // ISO 9660
    (32_769, b"BEA01"),    // UDF
    (3, b"NTFS    "),
    (3, b"EXFAT   "),
    (3, b"-FVE-FS-"), // BitLocker
    (3, b"ReFS\0"),
    (54, b"FAT1"),
    (82, b"FAT32"),
    (4086, b"SWAPSPACE2"),
    (4086, b"SWAP-SPACE"),
    (0, b"LABELONE"), // LVM, in one of the first four sectors
    (512, b"LABELONE"),
    (1024, b"LABELONE"),
    (1536, b"LABELONE"),
    (0, b"\xfc\x4e\x2b\xa9"), // Linux RAID
    (4096, b"\xfc\x4e\x2b\xa9"),
    (0, b"hsqs"),                                // SquashFS
    (1024, b"\xe2\xe1\xf5\xe0"),                 // EROFS
    (1024, b"\x10\x20\xf5\xf2"),                 // F2FS
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"), // bcachefs
    (4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
    (1024, b"H+\0\x04"), // HFS+
    (1024, b"HX\0\x05"),
    (1024, b"BD"), // HFS
    (32, b"NXSB"), // APFS
    (32_768, b"JFS1"),
    (65_588, b"ReIsEr"),
    (1040, b"\x7f\x13"), // Minix
    (1040, b"\x8f\x13"),
    (1040, b"\x68\x24"),
    (0, b"UBI#"),
    (40, b"_FVH"), // variables of UEFI firmware
    (0, b"SWTPMLIN"),
];

/// True if the first bytes show that the file is a disk. Reads further bytes from `bytes`, if the file can be read by
/// position.
pub(crate) fn is_disk(head: &[u8], bytes: Option<&RandomInput>) -> bool {
    /// Longest magic number of the table.
    const LEN: usize = 10;
    let later = |magic: &Magic| {
        let (at, text) = *magic;
        let mut found = [0; LEN];
        let found = &mut found[..text.len().min(LEN)];
        // Without these bytes the content stays unknown, which takes a note.
        bytes.is_some_and(|bytes| bytes.read_exact_at(found, at as u64).is_ok() && found == text)
    };
    let mut contents = DISK_CONTENTS.iter();
    contents.any(|magic| has(head, 0, magic) || magic.0 >= head.len() && later(magic))
}

/// Number of stored bytes that are searched for data in a file that begins with zeros. Our limit: it takes a few
/// milliseconds, and an image whose beginning was lost has data before.
const SEARCHED: u64 = 16 << 20;

/// Number of bytes of one read of the search.
const SEARCH_BUFFER: usize = 256 << 10;

/// True if the file holds nothing but zeros, like a new disk. Searches [`SEARCHED`] bytes, and none of the holes. A
/// stream shows only its first bytes, so it is blank if it ends with them.
pub(crate) fn is_blank(head: &[u8], bytes: Option<&RandomInput>) -> bool {
    let is_short = head.len() < PROBE_LEN;
    // A read that fails here fails again in the copy.
    is_zero(head) && bytes.map_or(is_short, |bytes| finds_only_zeros(bytes).unwrap_or(true))
}

fn finds_only_zeros(bytes: &RandomInput) -> Result<bool> {
    let mut buffer = vec![0; SEARCH_BUFFER];
    let (mut position, mut left) = (0, SEARCHED);
    while position < bytes.len() && left > 0 {
        let run = bytes.run(position)?;
        if !run.is_data {
            position = run.end.max(position + 1);
            continue;
        }
        let len = (run.end.saturating_sub(position)).min(left).min(SEARCH_BUFFER as u64).max(1);
        // At most the length of the buffer, so it fits.
        let part = &mut buffer[..len as usize];
        bytes.read_exact_at(part, position)?;
        if !is_zero(part) {
            return Ok(false);
        }
        (position, left) = (position + len, left - len);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use imgtool_core::{Input, ReadAt};

    use super::*;

    struct Bytes(Vec<u8>);

    impl ReadAt for Bytes {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            let position = usize::try_from(position).expect("short");
            let bytes = self.0.get(position..position + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            buf.copy_from_slice(bytes);
            Ok(())
        }

        fn len(&self) -> u64 {
            self.0.len() as u64
        }
    }

    #[test]
    fn magic_numbers_fit_the_reads() {
        assert!(DISK_CONTENTS.iter().all(|(_, magic)| magic.len() <= 10 && !magic.is_empty()));
        let known = NO_DISKS.iter().chain([&TAR]);
        assert!(known.flat_map(|known| known.magics).all(|(at, magic)| at + magic.len() < 512));
    }

    /// No refusal of what a disk can begin with.
    #[test]
    fn disks_are_no_other_files() {
        for magic in DISK_CONTENTS.iter().filter(|(at, magic)| at + magic.len() <= 4096) {
            let mut head = vec![0; 4096];
            head[magic.0..magic.0 + magic.1.len()].copy_from_slice(magic.1);
            assert!(no_disk_by_head(&head).is_none(), "{magic:?}");
            assert!(is_disk(&head, None), "{magic:?}");
        }
        let mut kernel = vec![0; 4096];
        kernel[..2].copy_from_slice(b"MZ");
        kernel[60] = 0x80;
        kernel[0x80..0x84].copy_from_slice(b"PE\0\0");
        assert!(no_disk_by_head(&kernel).is_some());
        kernel[510..512].copy_from_slice(b"\x55\xaa");
        assert!(no_disk_by_head(&kernel).is_none());
    }

    #[test]
    fn file_systems_are_found_behind_the_first_bytes() {
        for (at, magic) in [(32_769, &b"CD001"[..]), (65_600, b"_BHRfS_M"), (4096, b"EFI PART")] {
            let mut disk = vec![0; 128 << 10];
            disk[..3].copy_from_slice(b"abc");
            disk[at..at + magic.len()].copy_from_slice(magic);
            let head = disk[..4096].to_vec();
            assert!(!is_disk(&head, None));
            let bytes =
                Input::from_read_at("disk", Arc::new(Bytes(disk))).into_random().expect("bytes in memory");
            assert!(is_disk(&head, Some(&bytes)));
        }
    }

    #[test]
    fn files_without_a_magic_number_are_known() {
        let mut tar = vec![0; 4096];
        tar[..8].copy_from_slice(b"disk.img");
        tar[100..107].copy_from_slice(b"0000644");
        let sum: u64 = tar[..512].iter().map(|byte| u64::from(*byte)).sum::<u64>() + 8 * u64::from(b' ');
        tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let name = |head: &[u8]| no_disk_by_head(head).map(|found| found.name);
        assert_eq!(name(&tar), Some("a tar archive"));
        tar[0] ^= 1;
        assert_eq!(name(&tar), None);
        assert_eq!(name(b"\x1f\x9d\x90abc"), Some("a file of compress(1)"));
        assert_eq!(name(b"\x1f\x9d\x03abc"), None);
        let lzma = |dictionary: u32, len: u64| {
            [&b"\x5d"[..], &dictionary.to_le_bytes(), &len.to_le_bytes(), b"abc"].concat()
        };
        for (dictionary, len, expected) in [
            (8 << 20, u64::MAX, Some("an lzma file")),
            (3 << 20, 700, Some("an lzma file")),
            (8 << 20, u64::MAX - 1, None),
            (5 << 20, 700, None),
        ] {
            assert_eq!(name(&lzma(dictionary, len)), expected, "{dictionary} {len}");
        }
    }

    #[test]
    fn blank_disks_hold_no_data() {
        let is_blank = |disk: Vec<u8>| {
            let head = disk[..disk.len().min(PROBE_LEN)].to_vec();
            let input = Input::from_read_at("disk", Arc::new(Bytes(disk)));
            super::is_blank(&head, Some(&input.into_random().expect("bytes in memory")))
        };
        assert!(is_blank(Vec::new()));
        assert!(is_blank(vec![0; 1 << 20]));
        for at in [0, 4096, 300_000, (1 << 20) - 1] {
            let mut disk = vec![0; 1 << 20];
            disk[at] = 1;
            assert!(!is_blank(disk), "{at}");
        }
        assert!(super::is_blank(&[0; 100], None));
        assert!(!super::is_blank(&[0; PROBE_LEN], None));
    }

    #[test]
    fn parts_of_a_disk_lead_to_its_descriptor() {
        for (part, expected) in [
            ("d-flat.vmdk", Some("d.vmdk")),
            ("a-b-f012.vmdk", Some("a-b.vmdk")),
            ("d-foo.vmdk", None),
            ("-flat.vmdk", None),
            ("d-flat.raw", None),
        ] {
            assert_eq!(descriptor_of(part).as_deref(), expected, "{part}");
        }
    }
}
