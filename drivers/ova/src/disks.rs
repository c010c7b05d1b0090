//! The disks of a package: which of its files they are, and how they are opened.

use std::collections::HashMap;
use std::ops::Range;

use imgtool_core::{
    Device, Disk, Error, Extent, ExtentKind, FileRange, Input, MapExtent, OpenOptions, Remedy, Result,
    ResultExt,
};

use imgtool_machine::ovf::{Descriptor, DiskRef};

use crate::files::{Files, StoredFile};

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
        open_entry(id, entry, descriptor, files, &options).on_device(&entry.device)
    };
    disks.map(open).collect()
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
        let listed: Vec<_> = names.iter().take(5).map(|name| format!("'{name}'")).collect();
        let more = if names.len() > listed.len() { " and others" } else { "" };
        return Err(Error::unsupported(format!(
            "the archive has no disk: it contains {}{more}",
            if listed.is_empty() { "no file".to_owned() } else { listed.join(", ") }
        ))
        .hint("unpack it, and convert the disk image in it by its name"));
    }
    if named.len() > MAX_DISKS as usize {
        return Err(Error::limit(format!("the archive has {} disks; the limit is {MAX_DISKS}", named.len())));
    }
    let options = member_options(options, named.len());
    let open = |(id, name): (u32, &str)| {
        let device = stem(name);
        let disk = open_file(files.expect(name)?, name, None, &options).on_device(&device)?;
        let device = Device::disk(id, device, disk.size());
        Ok(PackagedDisk { device, disk: Some(disk), files: Vec::new(), notes: Vec::new() })
    };
    (0..).zip(named).map(open).collect()
}

/// Returns options for the images in a package, which share its memory.
pub(crate) fn member_options(options: &OpenOptions, count: usize) -> OpenOptions {
    let memory = options.memory.shared_by(count);
    OpenOptions { memory, plain: false, snapshot: None, bitmaps: false, ..options.clone() }
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
        return Ok(PackagedDisk { device, disk: None, files: Vec::new(), notes: Vec::new() });
    };
    let (input, stored) = match file.chunk_size {
        Some(_) => files.expect_chunks(&file.href, &options.memory)?,
        None => {
            let bytes = files.expect(&file.href)?.into_random()?;
            (Input::from(bytes.clone()), vec![StoredFile { name: file.href.clone(), bytes }])
        }
    };
    let mut notes = Vec::new();
    let stored_len = input.len();
    if let (Some(stated), Some(len)) = (file.size, stored_len)
        && stated != len
    {
        notes.push(format!("'{}' has {len} bytes, the descriptor says {stated}", file.href));
    }
    let input = if file.gzip { options.externals.decompressed(input, "gzip")? } else { input };
    // Below the compression, the extension tells the format.
    let inner = compression_of(&file.href).filter(|_| file.gzip).map_or(&*file.href, |(inner, _)| inner);
    let disk = open_image(input, inner, format_of_uri(&entry.format), options)?;
    // Every other format tells by itself that its file was cut.
    if disk.image().info().format == "raw" && !options.salvage {
        let lengths = [(file.size, stored_len), (entry.capacity, Some(disk.size()))];
        if let Some((Some(stated), Some(found))) = lengths.into_iter().find(|(stated, found)| stated > found)
        {
            return Err(Error::corrupt(format!(
                "'{}' is cut short: it has {found} bytes of the {stated} that the descriptor says",
                file.href
            ))
            .remedied_by(Remedy::Salvage("export or copy the package again".into())));
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
    Ok(PackagedDisk { device, disk: Some(disk), files: stored, notes })
}

/// Opens a file of an archive as a disk, without its compression.
fn open_file(input: Input, name: &str, format: Option<&str>, options: &OpenOptions) -> Result<Disk> {
    match compression_of(name) {
        Some((inner, compression)) => {
            open_image(options.externals.decompressed(input, compression)?, inner, format, options)
        }
        None => open_image(input, name, format, options),
    }
}

/// Opens the image in a file. The extension decides about the format, or else `format`, or else the content.
fn open_image(input: Input, name: &str, format: Option<&str>, options: &OpenOptions) -> Result<Disk> {
    let extension = extension(name).unwrap_or_default().to_ascii_lowercase();
    let named = FORMATS.iter().find(|(known, _)| *known == extension).map(|(_, format)| *format);
    let image = options.externals.open_member(input, named.or(format), options)?;
    Disk::only(image, "a file in a package")
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

/// True if the extension is that of a disk image, compressed or not.
fn is_disk_name(name: &str) -> bool {
    let inner = compression_of(name).map_or(name, |(inner, _)| inner);
    let Some(extension) = extension(inner) else { return false };
    let mut known = FORMATS.iter().map(|(known, _)| *known).chain(DISK_EXTENSIONS);
    known.any(|known| extension.eq_ignore_ascii_case(known))
}

/// Returns the name of the disk in a file: without directories, and without the extensions of image and
/// compression.
fn stem(name: &str) -> String {
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
        for (name, expected) in
            [("a.vmdk", true), ("a.VMDK.gz", true), ("README.txt", false), ("vmdk", false), ("a.img", true)]
        {
            assert_eq!(is_disk_name(name), expected, "{name}");
        }
    }
}
