//! The disks of a package: which of its files they are, and how they are opened.

use std::collections::HashMap;
use std::ops::Range;

use imgtool_core::{
    Device, Disk, Error, ErrorKind, Extent, ExtentKind, FileRange, Input, Loss, MapExtent, OpenOptions,
    RandomInput, Remedy, Result, ResultExt, suggest,
};

use imgtool_machine::ovf::{Descriptor, DiskRef};

use crate::files::{Files, StoredFile};
use crate::manifest;
use crate::salvage;

/// Maximum number of disks. Our limit: that of a VMA archive.
pub(crate) const MAX_DISKS: u32 = 254;

/// Maximum size in bytes of an empty disk. Our limit: 64 TiB, that of VHDX.
const MAX_EMPTY: u64 = 64 << 40;

/// Formats of files with these extensions. A disk's own content must not decide for another format.
const FORMATS: [(&str, &str); 9] = [
    ("vmdk", "vmdk"),
    ("vhd", "vhd"),
    ("vpc", "vhd"),
    ("vhdx", "vhdx"),
    ("qcow2", "qcow2"),
    ("vdi", "vdi"),
    ("qed", "qed"),
    ("hds", "parallels"),
    ("raw", "raw"),
];

/// Extensions of further files that may be disks, if no descriptor says so. Their content decides.
const DISK_EXTENSIONS: [&str; 4] = ["img", "qcow", "dmg", "bochs"];

/// Extensions of compressed files, with the names of the compressions.
const COMPRESSIONS: [(&str, &str); 5] =
    [("gz", "gzip"), ("zst", "zstd"), ("xz", "xz"), ("bz2", "bzip2"), ("lzo", "lzop")];

/// A disk of a package.
#[derive(Debug)]
pub(crate) struct PackagedDisk {
    pub(crate) device: Device,
    /// The open image; `None` for a disk without a file, which is empty.
    pub(crate) disk: Option<Disk>,
    /// Files with the image.
    pub(crate) files: Vec<StoredFile>,
    /// Notes for the user.
    pub(crate) notes: Vec<String>,
    /// Losses that are known since the package was opened.
    pub(crate) losses: Vec<Loss>,
}

/// Opens the disks that a descriptor lists, in its order.
///
/// # Errors
/// If a disk can't be opened, or the descriptor contradicts itself.
pub(crate) fn open_described(
    descriptor: &Descriptor,
    files: &Files,
    options: &OpenOptions,
) -> Result<Vec<PackagedDisk>> {
    if descriptor.disks.len() > MAX_DISKS as usize {
        return Err(Error::limit(format!(
            "the descriptor lists {} disks; the limit is {MAX_DISKS}",
            descriptor.disks.len()
        )));
    }
    refuse_shared_files(descriptor)?;
    let options = member_options(options, descriptor.disks.len());
    let disks = (0..).zip(&descriptor.disks);
    let open = |(id, entry): (u32, &DiskRef)| {
        let opened = open_entry(id, entry, descriptor, files, &options);
        match (opened, entry.capacity) {
            // What is behind the end of a cut package.
            (Err(error), Some(size)) if options.salvage && is_damage(&error) && size <= MAX_EMPTY => {
                Ok(salvage::lost(id, &entry.device, size, error.message().to_owned()))
            }
            (opened, _) => opened.on_device(&entry.device),
        }
    };
    disks.map(open).collect()
}

/// True for the error of a file that is damaged, missing or cut.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed | ErrorKind::WrongFormat)
}

/// Refuses two disks in one file: each opening takes memory, and temporary storage if the file is compressed.
/// VMware's importers refuse them as well.
fn refuse_shared_files(descriptor: &Descriptor) -> Result<()> {
    let mut users = HashMap::new();
    for disk in &descriptor.disks {
        let Some(file) = disk.file else { continue };
        if let Some(other) = users.insert(file, &disk.device) {
            let href = descriptor.files.get(file).map_or("", |file| &file.href);
            return Err(Error::unsupported(format!(
                "the disks '{other}' and '{}' are both in the file '{href}'",
                disk.device
            ))
            .hint("export the machine with a file for each disk"));
        }
    }
    Ok(())
}

/// Opens all disks of an archive without a descriptor: its only file, or the files with the extension of a
/// disk.
///
/// # Errors
/// `Unsupported` if there is none; `LimitExceeded` for too many; any error of opening one.
pub(crate) fn open_all(files: &Files, names: &[&str], options: &OpenOptions) -> Result<Vec<PackagedDisk>> {
    let named: Vec<&str> = names.iter().copied().filter(|name| is_disk_name(name)).collect();
    let named = if named.is_empty() && names.len() == 1 { names.to_vec() } else { named };
    if named.is_empty() {
        let Some(names) = manifest::first_names(names.iter().copied()) else {
            return Err(Error::unsupported("the archive has no disk: it contains no file")
                .hint("the archive may have been made of an empty directory: check it"));
        };
        return Err(Error::unsupported("no file in the archive has the extension of a disk image")
            .remedied_by(Remedy::ChooseMember { names }));
    }
    if named.len() > MAX_DISKS as usize {
        return Err(Error::limit(format!("the archive has {} disks; the limit is {MAX_DISKS}", named.len())));
    }
    let options = member_options(options, named.len());
    let open = |(id, name): (u32, &str)| open_one(id, files.expect(name)?.into_random()?, name, &options);
    (0..).zip(named).map(open).collect()
}

/// Opens a file of an archive as the disk with this number.
///
/// # Errors
/// Any error of opening it.
pub(crate) fn open_one(
    id: u32,
    bytes: RandomInput,
    name: &str,
    options: &OpenOptions,
) -> Result<PackagedDisk> {
    let device = stem(name);
    let (disk, losses) = open_file(bytes.clone().into(), name, None, options).on_device(&device)?;
    let device = Device::disk(id, device, disk.size());
    let files = vec![StoredFile { name: name.to_owned(), bytes }];
    Ok(PackagedDisk { device, disk: Some(disk), files, notes: Vec::new(), losses })
}

/// Returns the name of the member that the user chose: the whole name, or that of its file without
/// directories.
///
/// # Errors
/// `Usage` if there is none of this name, or if there are several.
pub(crate) fn choose<'n>(wanted: &str, names: &'n [String]) -> Result<&'n str> {
    let base = |name: &&String| name.rsplit('/').next() == Some(wanted);
    let mut same_base = names.iter().filter(base);
    let exact = names.iter().find(|name| *name == wanted);
    let found = exact.or_else(|| same_base.next().filter(|_| same_base.next().is_none()));
    found.map(String::as_str).ok_or_else(|| no_member(wanted, names))
}

/// Returns the error for a name that none of the members has, or several.
pub(crate) fn no_member(wanted: &str, names: &[String]) -> Error {
    let known = names.iter().map(String::as_str);
    Error::usage(format!("no member of the archive is called '{wanted}', or several are"))
        .hint(suggest::hint(wanted, "members", known))
}

/// True for the name of a file that is a raw disk without a compression.
pub(crate) fn is_raw_name(name: &str) -> bool {
    extension(name).is_some_and(|extension| extension.eq_ignore_ascii_case("raw"))
}

/// Returns options for the images in a package, which share its memory.
pub(crate) fn member_options(options: &OpenOptions, count: usize) -> OpenOptions {
    let memory = options.memory.shared_by(count);
    OpenOptions { memory, plain: false, snapshot: None, bitmaps: false, member: None, ..options.clone() }
}

fn open_entry(
    id: u32,
    entry: &DiskRef,
    descriptor: &Descriptor,
    files: &Files,
    options: &OpenOptions,
) -> Result<PackagedDisk> {
    let Some(file) = entry.file.and_then(|index| descriptor.files.get(index)) else {
        let size = entry.capacity.filter(|size| *size <= MAX_EMPTY);
        let size =
            size.ok_or_else(|| Error::malformed("a disk has neither a file nor a size of at most 64 TiB"))?;
        let device = Device::disk(id, entry.device.as_str(), size);
        let (files, notes, losses) = (Vec::new(), Vec::new(), Vec::new());
        return Ok(PackagedDisk { device, disk: None, files, notes, losses });
    };
    let href = files.name_of(file)?;
    let (input, stored) = match file.chunk_size {
        Some(_) => files.expect_chunks(&href, &options.memory)?,
        None => {
            let bytes = files.expect(&href)?.into_random()?;
            (Input::from(bytes.clone()), vec![StoredFile { name: href.to_string(), bytes }])
        }
    };
    let mut notes = Vec::new();
    let stored_len = input.len();
    if let (Some(stated), Some(len)) = (file.size, stored_len)
        && stated != len
    {
        notes.push(format!("'{href}' has {len} bytes, the descriptor says {stated}"));
    }
    let input = if file.gzip { options.externals.decompressed(input, "gzip")? } else { input };
    // Below the compression, the extension tells the format.
    let inner = compression_of(&href).filter(|_| file.gzip).map_or(&*href, |(inner, _)| inner);
    let (disk, mut losses) = open_image(input, inner, format_of_uri(&entry.format), options)?;
    // Every other format tells by itself that its file was cut.
    if disk.image().info().format == "raw" {
        let lengths = [(file.size, stored_len), (entry.capacity, Some(disk.size()))];
        if let Some((Some(stated), Some(found))) = lengths.into_iter().find(|(stated, found)| stated > found)
        {
            let cut = format!(
                "'{href}' is cut short: it has {found} bytes of the {stated} that the descriptor says"
            );
            if !options.salvage {
                return Err(Error::corrupt(cut)
                    .remedied_by(Remedy::Salvage("export or copy the package again".into())));
            }
            losses.push(salvage::loss(id, disk.size()..disk.size(), cut));
        }
    }
    if let Some(capacity) = entry.capacity.filter(|capacity| *capacity != disk.size()) {
        notes.push(format!(
            "{}: the descriptor says {capacity} bytes, the disk has {}, which count",
            entry.device,
            disk.size()
        ));
    }
    let device = Device::disk(id, entry.device.as_str(), disk.size());
    Ok(PackagedDisk { device, disk: Some(disk), files: stored, notes, losses })
}

/// Opens a file of an archive as a disk, without its compression.
fn open_file(
    input: Input,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<(Disk, Vec<Loss>)> {
    match compression_of(name) {
        Some((inner, compression)) => {
            open_image(options.externals.decompressed(input, compression)?, inner, format, options)
        }
        None => open_image(input, name, format, options),
    }
}

/// Opens the image in a file, and returns what is lost of it. The extension decides about the format, or else
/// `format`, or else the content.
fn open_image(
    input: Input,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<(Disk, Vec<Loss>)> {
    let extension = extension(name).unwrap_or_default().to_ascii_lowercase();
    let named = FORMATS.iter().find(|(known, _)| *known == extension).map(|(_, format)| *format);
    let image = options.externals.open_member(input, named.or(format), options)?;
    salvage::by_position(image, options)
}

/// Returns the format that the descriptor states by the address of its specification.
fn format_of_uri(uri: &str) -> Option<&'static str> {
    let uri = uri.to_ascii_lowercase();
    let known = [("vmdk", "vmdk"), ("linkid=137171", "vhd"), ("qcow", "qcow2"), ("vhdx", "vhdx")];
    known.iter().find(|(part, _)| uri.contains(part)).map(|(_, format)| *format)
}

fn extension(name: &str) -> Option<&str> {
    name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).map(|(_, extension)| extension)
}

/// Returns the name without the extension of a compression, and the compression.
fn compression_of(name: &str) -> Option<(&str, &'static str)> {
    let (inner, extension) = name.rsplit_once('.')?;
    let known = COMPRESSIONS.iter().find(|(known, _)| extension.eq_ignore_ascii_case(known));
    known.map(|(_, compression)| (inner, *compression))
}

/// True if the extension is that of a disk image, compressed or not. Files that begin with `._` hold attributes of
/// macOS, which its archives contain beside each file (AppleDouble).
pub(crate) fn is_disk_name(name: &str) -> bool {
    if name.rsplit('/').next().is_some_and(|file| file.starts_with("._")) {
        return false;
    }
    let inner = compression_of(name).map_or(name, |(inner, _)| inner);
    let Some(extension) = extension(inner) else { return false };
    let mut known = FORMATS.iter().map(|(known, _)| *known).chain(DISK_EXTENSIONS);
    known.any(|known| extension.eq_ignore_ascii_case(known))
}

/// Returns the name of the disk in a file: without directories, and without the extensions of image and
/// compression.
pub(crate) fn stem(name: &str) -> String {
    let file = name.rsplit('/').next().unwrap_or(name);
    let inner = compression_of(file).map_or(file, |(inner, _)| inner);
    let stem = match is_disk_name(inner) {
        true => inner.rsplit_once('.').map_or(inner, |(stem, _)| stem),
        false => inner,
    };
    if stem.is_empty() { "disk".to_owned() } else { stem.to_owned() }
}

impl PackagedDisk {
    pub(crate) fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        match &self.disk {
            Some(disk) => disk.extents(range),
            None => Ok(imgtool_core::source::uniform_extent(range, ExtentKind::Hole)),
        }
    }

    pub(crate) fn rough_extents(&self, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        match &self.disk {
            Some(disk) => disk.rough_extents(range, resolution),
            None => self.extents(range),
        }
    }

    pub(crate) fn map(&self, range: Range<u64>) -> Result<Vec<MapExtent>> {
        match &self.disk {
            Some(disk) => disk.map(range),
            None => Ok(self.extents(range)?.into_iter().map(MapExtent::of).collect()),
        }
    }

    pub(crate) fn read_at(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        match &self.disk {
            Some(disk) => disk.read_at(buf, guest_offset),
            None => {
                buf.fill(0);
                Ok(())
            }
        }
    }

    pub(crate) fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>> {
        self.disk.as_ref()?.locate(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_after_their_files() {
        for (file, name) in [
            ("vm-disk1.vmdk", "vm-disk1"),
            ("d/e/vm.1.qcow2.gz", "vm.1"),
            ("disk.raw", "disk"),
            ("box.img.xz", "box"),
            ("data", "data"),
            ("data.bin", "data.bin"),
            (".vmdk", ".vmdk"),
        ] {
            assert_eq!(stem(file), name, "{file}");
        }
        for (name, expected) in [
            ("a.vmdk", true),
            ("a.VMDK.gz", true),
            ("README.txt", false),
            ("vmdk", false),
            ("a.img", true),
            ("__MACOSX/._a.raw", false),
            ("._a.raw", false),
        ] {
            assert_eq!(is_disk_name(name), expected, "{name}");
        }
    }
}
