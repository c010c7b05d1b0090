//! Comparison of outputs with the expected disks, without the program's own readers.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use imgtool_vma::layout;
use rustix::fs::SeekFrom;
use twox_hash::XxHash3_128;

use super::program;

/// Unit of the comparison in bytes: the length of a page.
const UNIT: usize = 4096;

/// Byte that fills existing targets before a conversion into them.
pub const OLD_BYTE: u8 = 0xee;

/// Length and digest of a file, whose holes take no time. A hole and stored zeros give the same digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest {
    /// Length in bytes.
    pub len: u64,
    /// Number of units that are not zero.
    pub units: u64,
    digest: u128,
}

/// Computes the digest of the first `len` bytes of a file.
///
/// # Errors
/// If the file can't be read.
pub fn digest_of(path: &Path, len: u64) -> io::Result<Digest> {
    let file = File::open(path)?;
    let mut hasher = XxHash3_128::new();
    let mut units = 0;
    let mut at = 0;
    let mut buffer = vec![0; 64 * UNIT];
    while at < len {
        at = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data / UNIT as u64 * UNIT as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let part = usize::try_from(len.saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.len());
        file.read_exact_at(&mut buffer[..part], at)?;
        for unit in buffer[..part].chunks(UNIT) {
            if let Some(last) = unit.iter().rposition(|byte| *byte != 0) {
                hasher.write(&at.to_le_bytes());
                hasher.write(&unit[..=last]);
                units += 1;
            }
            at += unit.len() as u64;
        }
    }
    Ok(Digest { len, units, digest: hasher.finish_128() })
}

/// Computes the digest of a whole file.
///
/// # Errors
/// If the file can't be read.
pub fn digest(path: &Path) -> io::Result<Digest> {
    digest_of(path, std::fs::metadata(path)?.len())
}

/// A difference between an output and the expected disk, as a kind and a message.
pub type Verdict = Result<(), (&'static str, String)>;

fn broken(kind: &'static str) -> impl Fn(io::Error) -> (&'static str, String) {
    move |error| (kind, error.to_string())
}

/// Judges a raw output, which must be sparse if `is_sparse`. With `old`, the output is that many bytes longer
/// than the disk, and these must be unchanged.
///
/// # Errors
/// If the content differs.
pub fn raw(output: &Path, expected: &Path, is_sparse: bool, old: u64) -> Verdict {
    let wanted = digest(expected).map_err(broken("expected"))?;
    let file = File::open(output).map_err(broken("missing"))?;
    let meta = file.metadata().map_err(broken("missing"))?;
    if meta.len() != wanted.len + old {
        return Err(("size", format!("{} of {} bytes", meta.len(), wanted.len + old)));
    }
    if digest_of(output, wanted.len).map_err(broken("read"))? != wanted {
        return Err(("content", format!("{} differs", output.display())));
    }
    let mut tail = vec![0; usize::try_from(old).unwrap_or(0)];
    file.read_exact_at(&mut tail, wanted.len).map_err(broken("read"))?;
    if tail.iter().any(|byte| *byte != OLD_BYTE) {
        return Err(("tail", "bytes behind the disk have changed".to_owned()));
    }
    let allocated = meta.blocks() * 512;
    if is_sparse && allocated > (wanted.units + 16) * UNIT as u64 {
        return Err(("sparse", format!("{allocated} bytes for {} units of data", wanted.units)));
    }
    Ok(())
}

/// Judges a qcow2 or VHDX output by `qemu-img compare` and `qemu-img check`.
///
/// # Errors
/// If the content or the structure is wrong.
pub fn by_qemu(format: &str, output: &Path, expected: &Path) -> Verdict {
    // QEMU looks for a data file in its current directory.
    let directory = output.parent().unwrap_or(output);
    let mut compare = Command::new("qemu-img");
    compare.current_dir(directory);
    compare.args(["compare", "-f", "raw", "-F", format]).args([expected, output]);
    let outcome = program::run(compare, None, None).map_err(broken("qemu-img"))?;
    // Sizes must be equal, too, which is only a warning there.
    if outcome.code != Some(0) || outcome.text.contains("size mismatch") {
        return Err(("content", format!("{}: {:?} {}", outcome.line, outcome.code, outcome.text)));
    }
    let mut check = Command::new("qemu-img");
    check.current_dir(directory);
    check.args(["check", "-f", format]).arg(output);
    let outcome = program::run(check, None, None).map_err(broken("qemu-img"))?;
    if outcome.code != Some(0) {
        return Err(("structure", format!("{}: {:?} {}", outcome.line, outcome.code, outcome.text)));
    }
    Ok(())
}

/// Undoes outer compression with the usual program.
///
/// # Errors
/// If that program refuses the file.
pub fn unpack(extension: &str, packed: &Path, plain: &Path) -> Verdict {
    compressor(extension, "-dc", packed, plain)
}

/// Compresses a file with the usual program.
///
/// # Errors
/// If that program fails.
pub fn pack(extension: &str, plain: &Path, packed: &Path) -> Verdict {
    compressor(extension, "-1c", plain, packed)
}

fn compressor(extension: &str, flags: &str, from: &Path, to: &Path) -> Verdict {
    let names = [("zst", "zstd"), ("gz", "gzip"), ("xz", "xz"), ("bz2", "bzip2"), ("lzo", "lzop")];
    let name = names.into_iter().find(|(known, _)| *known == extension).map_or("zstd", |(_, name)| name);
    let mut command = Command::new(name);
    command.arg(flags);
    let outcome = program::run(command, Some(from), Some(to)).map_err(broken("compressor"))?;
    if outcome.code != Some(0) {
        return Err(("compressor", format!("{}: {:?} {}", outcome.line, outcome.code, outcome.text)));
    }
    Ok(())
}

/// A disk that was read from an archive.
#[derive(Debug)]
pub struct ArchiveDisk {
    /// Name of the device.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    file: File,
    seen: Vec<bool>,
}

/// Reads a VMA archive into raw files `0`, `1` … in `directory`, with code that shares nothing with the driver
/// except the checksums. Devices are in the order of their ids.
///
/// # Errors
/// If the archive is damaged or incomplete.
pub fn read_archive(archive: &mut impl Read, directory: &Path) -> io::Result<Vec<ArchiveDisk>> {
    let wrong = |message: String| io::Error::new(io::ErrorKind::InvalidData, message);
    let mut header = vec![0; layout::HEADER_FIXED];
    archive.read_exact(&mut header)?;
    let header_size = be32(&header, 56) as usize;
    if !header.starts_with(b"VMA\0") || !(header.len()..=16 << 20).contains(&header_size) {
        return Err(wrong("no header".to_owned()));
    }
    let fixed = header.len();
    header.resize(header_size, 0);
    archive.read_exact(&mut header[fixed..])?;
    if header[32..48] != layout::header_md5(&header) {
        return Err(wrong("wrong checksum of the header".to_owned()));
    }
    let mut disks = read_devices(&header, directory)?;
    let mut extent = [0; layout::EXTENT_HEADER];
    while read_full(archive, &mut extent)? {
        if !extent.starts_with(b"VMAE") || extent[8..24] != header[8..24] {
            return Err(wrong("no extent".to_owned()));
        }
        if extent[24..40] != layout::extent_md5(&extent) {
            return Err(wrong("wrong checksum of an extent".to_owned()));
        }
        read_extent(archive, &extent, &mut disks)?;
    }
    let disks: Vec<ArchiveDisk> = disks.into_iter().flatten().collect();
    match disks.iter().find(|disk| disk.seen.contains(&false)) {
        Some(disk) => Err(wrong(format!("{}: clusters are missing", disk.name))),
        None => Ok(disks),
    }
}

/// Reads the device table, and creates a file for each device.
fn read_devices(header: &[u8], directory: &Path) -> io::Result<Vec<Option<ArchiveDisk>>> {
    let wrong = |message: String| io::Error::new(io::ErrorKind::InvalidData, message);
    let mut disks: Vec<Option<ArchiveDisk>> = Vec::new();
    for id in 0..256 {
        let entry = 4096 + 32 * id;
        let size = u64::from(be32(header, entry + 8)) << 32 | u64::from(be32(header, entry + 12));
        let at = be32(header, 48) as usize + be32(header, entry) as usize;
        if id == 0 || size == 0 || be32(header, entry) == 0 {
            disks.push(None);
            continue;
        }
        let len = usize::from(*header.get(at).ok_or_else(|| wrong("no name".to_owned()))?)
            | usize::from(*header.get(at + 1).unwrap_or(&0)) << 8;
        let name = header.get(at + 2..at + 2 + len).ok_or_else(|| wrong("no name".to_owned()))?;
        let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
        let file = File::create(directory.join(disks.iter().flatten().count().to_string()))?;
        file.set_len(size)?;
        let count = usize::try_from(size.div_ceil(layout::CLUSTER)).unwrap_or(usize::MAX);
        if count > 1 << 26 {
            return Err(wrong(format!("too large: {size}")));
        }
        disks.push(Some(ArchiveDisk { name, size, file, seen: vec![false; count] }));
    }
    Ok(disks)
}

fn read_extent(
    archive: &mut impl Read,
    extent: &[u8; layout::EXTENT_HEADER],
    disks: &mut [Option<ArchiveDisk>],
) -> io::Result<()> {
    let wrong = |message: String| io::Error::new(io::ErrorKind::InvalidData, message);
    let mut stored = 0;
    for slot in extent[40..].chunks_exact(8).filter(|slot| slot[3] != 0) {
        let mask = u16::from_be_bytes([slot[0], slot[1]]);
        let number = be32(slot, 4);
        let disk = disks[usize::from(slot[3])].as_mut().ok_or_else(|| wrong("no such device".to_owned()))?;
        match disk.seen.get_mut(number as usize) {
            Some(seen) if !*seen => *seen = true,
            // The reference program writes empty clusters behind the end of a disk.
            None if mask == 0 => {}
            _ => return Err(wrong(format!("{}: cluster {number} again, or behind the end", disk.name))),
        }
        for bit in (0..16).filter(|bit| mask & 1 << bit != 0) {
            let mut block = [0; UNIT];
            archive.read_exact(&mut block)?;
            stored += 1;
            let at = u64::from(number) * layout::CLUSTER + bit * UNIT as u64;
            let len = usize::try_from(disk.size.saturating_sub(at)).unwrap_or(UNIT).min(UNIT);
            if block.iter().any(|byte| *byte != 0) {
                disk.file.write_all_at(&block[..len], at)?;
            }
        }
    }
    if stored != u32::from(u16::from_be_bytes([extent[6], extent[7]])) {
        return Err(wrong(format!("an extent of {stored} blocks")));
    }
    Ok(())
}

/// Fills `buffer`; returns false at the end.
fn read_full(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..])? {
            0 if filled == 0 => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(true)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}
