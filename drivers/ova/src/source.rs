//! [`PackageSource`], an open package, read by position: every disk is read from its place in the archive.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, Attachment, DeviceId, Error, Extent, FileRange, ImageInfo, ImageSource, Input, Loss, LossClass,
    MapExtent, OpenOptions, RandomAccess, Result,
};

use imgtool_machine::ovf::{self, Descriptor, FileRef};

use crate::archive::Archive;
use crate::disks::{self, PackagedDisk};
use crate::files::{Files, read_small};
use crate::manifest::{self, Line, Manifest};
use crate::{salvage, tar};

/// Maximum length of a descriptor in bytes. Our limit: real ones have less than 30 KiB.
pub(crate) const MAX_DESCRIPTOR: u64 = 4 << 20;

/// An open package.
#[derive(Debug)]
pub(crate) struct PackageSource {
    info: ImageInfo,
    disks: Vec<Member>,
    files: Files,
    manifest: Option<Manifest>,
    salvage: bool,
    /// Losses by wrong digests.
    losses: Mutex<Vec<Loss>>,
}

/// A disk, with what is known about its reading.
#[derive(Debug)]
struct Member {
    disk: PackagedDisk,
    /// True once its content was asked for. Damaged tables may call data a hole, and a caller that shares
    /// blocks asks for places alone: neither reads a byte through this source.
    was_asked: AtomicBool,
    /// True once the digests of its files were compared.
    was_verified: AtomicBool,
}

impl PackageSource {
    /// Opens an archive, or the descriptor of a package in a directory. `format` is the name of the driver.
    pub(crate) fn open(format: &'static str, input: Input, options: &OpenOptions) -> Result<Self> {
        match format == crate::OVA && begins_like_xml(&input.head()?) {
            true => Self::open_folder(format, input, options),
            false => Self::open_archive(format, input, options),
        }
    }

    fn open_archive(format: &'static str, input: Input, options: &OpenOptions) -> Result<Self> {
        let mut archive = match format == crate::ZIP {
            true => Archive::open_zip(input.into_random()?, options)?,
            false if !tar::may_be_tar(&input.head()?) => {
                return Err(Error::wrong_format("not a tar archive").at(0));
            }
            false => Archive::open_tar(input.into_random()?, options)?,
        };
        let (notes, sums) = (std::mem::take(&mut archive.notes), archive.sums.take());
        let cut = archive.cut.take();
        let names: Vec<String> = archive.names().map(str::to_owned).collect();
        let form = archive.form();
        let files = Files::Archive(Box::new(archive));
        let info = ImageInfo { format, notes, ..ImageInfo::default() };
        if let Some(member) = &options.member {
            let manifest = match descriptor_name(&names) {
                Ok(Some(name)) => open_manifest(&files, &manifest_name(name, &names))?,
                _ => None,
            };
            let mut disks = disks::open_all(&files, &[disks::choose(member, &names)?], options)?;
            // Another member says nothing about this one.
            salvage::mark_cut(
                &mut disks,
                cut.filter(|cut| cut == member || cut.ends_with(&format!("/{member}"))),
            );
            return Ok(Self::new(info, disks, files, manifest.or(sums), options));
        }
        let Some(name) = descriptor_name(&names)? else {
            let mut info = info;
            describe_archive(&mut info, form, names.iter().map(String::as_str));
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut disks = disks::open_all(&files, &names, options)?;
            salvage::mark_cut(&mut disks, cut);
            return Ok(Self::new(info, disks, files, sums, options));
        };
        let text = read_small(files.expect(name)?, MAX_DESCRIPTOR, "the descriptor")?;
        let manifest_name = manifest_name(name, &names);
        let manifest = open_manifest(&files, &manifest_name)?;
        let mut info = info;
        match manifest.as_ref().map_or(Ok(()), |manifest| check_complete(manifest, &files, &names)) {
            Err(error) if options.salvage => info.notes.push(error.message().to_owned()),
            checked => checked?,
        }
        let mut source = Self::described(info, name, text, files, manifest, options)?;
        source.manifest = source.manifest.or(sums);
        salvage::mark_cut(source.disks.iter_mut().map(|member| &mut member.disk), cut);
        source.note_unlisted(&names, &[name, &manifest_name, &with_extension(name, "cert")]);
        Ok(source)
    }

    /// Makes a source of one member of a tar archive, which was copied to temporary storage.
    ///
    /// # Errors
    /// Any error of opening it.
    pub(crate) fn of_member(bytes: Input, name: &str, options: &OpenOptions) -> Result<Self> {
        let files = Files::Folder(bytes.location().clone(), options.externals.clone());
        let disk = disks::open_one(0, bytes.into_random()?, name, &disks::member_options(options, 1))?;
        let info = ImageInfo { format: crate::TAR, ..ImageInfo::default() };
        Ok(Self::new(info, vec![disk], files, None, options))
    }

    fn open_folder(format: &'static str, input: Input, options: &OpenOptions) -> Result<Self> {
        let location = input.location().clone();
        let text = read_small(input, MAX_DESCRIPTOR, "the descriptor")?;
        let name = location.file_name().unwrap_or_default().into_owned();
        let files = Files::Folder(location, options.externals.clone());
        let manifest = match open_manifest(&files, &with_extension(&name, "mf"))? {
            None => open_manifest(&files, &with_extension(&name, "MF"))?,
            found => found,
        };
        if let Some(manifest) = manifest.as_ref().filter(|_| !options.salvage) {
            let others = manifest.lines.iter().filter(|line| line.name != name);
            others.map(|line| &line.name).try_for_each(|name| files.expect(name).map(drop))?;
        }
        let info = ImageInfo { format, ..ImageInfo::default() };
        if let Some(member) = &options.member {
            let disks = disks::open_all(&files, &[member.as_str()], options)?;
            return Ok(Self::new(info, disks, files, manifest, options));
        }
        Self::described(info, &name, text, files, manifest, options)
    }

    /// Opens the disks that the descriptor `text` lists.
    fn described(
        info: ImageInfo,
        name: &str,
        text: Vec<u8>,
        files: Files,
        manifest: Option<Manifest>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let descriptor = ovf::parse(&text, None)?;
        let disks = disks::open_described(&descriptor, &files, options)?;
        let stored = || disks.iter().flat_map(|disk| &disk.files).map(|file| file.name.as_str());
        let undigested = manifest.as_ref().and_then(|manifest| manifest.note_unlisted(stored()));
        let absent = needless_files(&descriptor).filter(|file| files.lacks(file));
        let absent = note_absent(absent.map(|file| file.href.as_str()));
        let mut info = describe(info, name, text, descriptor, manifest.as_ref())?;
        info.notes.extend(undigested.into_iter().chain(absent));
        Ok(Self::new(info, disks, files, manifest, options))
    }

    fn new(
        mut info: ImageInfo,
        disks: Vec<PackagedDisk>,
        files: Files,
        manifest: Option<Manifest>,
        options: &OpenOptions,
    ) -> Self {
        info.devices = disks.iter().map(|disk| disk.device.clone()).collect();
        for disk in &disks {
            info.notes.extend(disk.notes.iter().cloned());
            let own = disk.disk.iter().flat_map(|open| &open.image().info().notes);
            info.notes.extend(own.map(|note| format!("{}: {note}", disk.device.name)));
        }
        let formats: Vec<&str> = disks.iter().map(|disk| format_of(disk)).collect();
        add_formats(&mut info, &formats);
        let variants: Vec<String> = disks.iter().map(variant_of).collect();
        info.worded_fact("disk-variants", "variants of the disks", variants.clone(), variants.join(", "));
        let member = |disk| Member { disk, was_asked: false.into(), was_verified: false.into() };
        let disks = disks.into_iter().map(member).collect();
        Self { info, disks, files, manifest, salvage: options.salvage, losses: Mutex::default() }
    }

    /// Notes the members that no one names.
    fn note_unlisted(&mut self, names: &[String], known: &[&str]) {
        let disks = || self.disks.iter().flat_map(|member| &member.disk.files);
        let used: std::collections::HashSet<&str> =
            disks().map(|file| file.name.as_str()).chain(known.iter().copied()).collect();
        let unused = names.iter().map(String::as_str).filter(|name| !used.contains(name));
        if let Some(unused) = manifest::first_names(unused) {
            self.info.notes.push(format!("no disk, and left out: {unused}"));
        }
    }

    /// Returns the lines of the manifest, without that of the descriptor, which was compared when the package
    /// was opened.
    pub(crate) fn lines(&self) -> impl Iterator<Item = &Line> {
        let is_descriptor = |line: &Line| self.info.attachments.iter().any(|known| known.name == line.name);
        let lines = self.manifest.iter().flat_map(|manifest| &manifest.lines);
        lines.filter(move |line| !is_descriptor(line))
    }

    /// Reads a file, and compares its digest.
    ///
    /// # Errors
    /// `Corrupt` for another digest; any error of reading it.
    pub(crate) fn check_line(&self, line: &Line) -> Result<()> {
        line.check_file(&self.files.expect(&line.name)?.into_random()?)
    }

    /// Returns the disks, with the names of their devices.
    pub(crate) fn disks(&self) -> impl Iterator<Item = &PackagedDisk> {
        self.disks.iter().map(|member| &member.disk)
    }

    fn member(&self, device: DeviceId) -> Result<&Member> {
        let member = self.disks.get(device.0 as usize);
        member.ok_or_else(|| Error::out_of_bounds(format!("the package has no device {device}")))
    }

    fn disk(&self, device: DeviceId) -> Result<&PackagedDisk> {
        self.member(device).map(|member| &member.disk)
    }

    /// Returns the disk of a device, and marks it for the digests that [`ImageSource::verify`] compares.
    fn content(&self, device: DeviceId) -> Result<&PackagedDisk> {
        let member = self.member(device)?;
        member.was_asked.store(true, Ordering::Relaxed);
        Ok(&member.disk)
    }

    /// Compares the digests of all files of a disk.
    fn verify_disk(&self, disk: &PackagedDisk) -> Result<()> {
        let Some(manifest) = &self.manifest else { return Ok(()) };
        let mut listed = disk.files.iter().filter_map(|file| Some((manifest.line(&file.name)?, file)));
        listed.try_for_each(|(line, file)| line.check_file(&file.bytes))
    }
}

/// Adds what a descriptor says to the facts about a package, and compares its digest.
pub(crate) fn describe(
    mut info: ImageInfo,
    name: &str,
    text: Vec<u8>,
    descriptor: Descriptor,
    manifest: Option<&Manifest>,
) -> Result<ImageInfo> {
    if let Some(line) = manifest.and_then(|manifest| manifest.line(name)) {
        let mut hasher = line.algorithm.hasher();
        hasher.update(&text);
        line.check(&hasher.finish())?;
    }
    if descriptor.disks.is_empty() {
        info.notes.push("the descriptor lists no disk".to_owned());
    }
    info.notes.extend(descriptor.notes);
    info.fact("system-type", "system type", descriptor.system_type);
    info.machine = Some(Box::new(descriptor.machine));
    info.attachments.push(Attachment { name: name.to_owned(), data: text });
    let stated = manifest.map_or_else(|| "none".to_owned(), |manifest| manifest.algorithms().join(", "));
    info.fact("manifest", "manifest", stated);
    Ok(info)
}

/// Returns the files that the descriptor lists and no disk needs, such as firmware variables.
pub(crate) fn needless_files(descriptor: &Descriptor) -> impl Iterator<Item = &FileRef> {
    let used: std::collections::HashSet<usize> =
        descriptor.disks.iter().filter_map(|disk| disk.file).collect();
    (0..).zip(&descriptor.files).filter(move |(index, _)| !used.contains(index)).map(|(_, file)| file)
}

/// Returns a note about files that the descriptor lists, that no disk needs and that are missing.
pub(crate) fn note_absent<'a>(names: impl Iterator<Item = &'a str>) -> Option<String> {
    let names = manifest::first_names(names)?;
    Some(format!("missing from the package, but needed by no disk: {names}"))
}

/// Adds the formats of the disks to the facts about a package.
pub(crate) fn add_formats(info: &mut ImageInfo, formats: &[&str]) {
    info.worded_fact("disk-formats", "formats of the disks", formats, formats.join(", "));
}

/// Adds what an archive of disks says by itself to the facts about it: its form, and its files.
pub(crate) fn describe_archive<'n>(
    info: &mut ImageInfo,
    form: Option<&'static str>,
    names: impl Iterator<Item = &'n str>,
) {
    /// Maximum number of names. Our limit: a person reads no more.
    const MAX_NAMES: usize = 16;
    if let Some(form) = form {
        info.fact("tar-format", "form of the archive", form);
    }
    let names: Vec<&str> = names.take(MAX_NAMES).collect();
    info.worded_fact("files", "files", names.as_slice(), names.join(", "));
}

/// True for the name of a descriptor.
pub(crate) fn is_descriptor_name(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".ovf") && !name.contains('/')
}

/// True for text that begins with a tag, after blanks and the mark of UTF-8.
pub(crate) fn begins_like_xml(head: &[u8]) -> bool {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    head.trim_ascii_start().first() == Some(&b'<')
}

fn format_of(disk: &PackagedDisk) -> &'static str {
    disk.disk.as_ref().map_or("empty", |open| open.image().info().format)
}

/// Returns the variant of the image with a disk, as its driver calls it; empty if it has none.
fn variant_of(disk: &PackagedDisk) -> String {
    let Some(open) = &disk.disk else { return "empty".to_owned() };
    let mut facts = open.image().info().facts.iter();
    let fact = facts.find(|fact| matches!(fact.key, "create-type" | "subformat"));
    fact.and_then(|fact| fact.value.as_str()).unwrap_or_default().to_owned()
}

/// Returns the name of the descriptor of an archive; `None` if it has none.
///
/// # Errors
/// `Malformed` for several.
fn descriptor_name(names: &[String]) -> Result<Option<&str>> {
    let mut found = names.iter().filter(|name| is_descriptor_name(name));
    match (found.next(), found.next()) {
        (Some(first), Some(second)) => {
            Err(Error::malformed(format!("the archive has two descriptors, '{first}' and '{second}'"))
                .hint("unpack it, and convert the one that you mean"))
        }
        (found, _) => Ok(found.map(String::as_str)),
    }
}

/// Returns the name of a file beside the descriptor `name`: `vm.mf` for `vm.ovf`.
pub(crate) fn with_extension(name: &str, extension: &str) -> String {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    format!("{stem}.{extension}")
}

/// Returns the name of the manifest of an archive with these members: that of the descriptor, also in another
/// case, or that of the only manifest. Importers and exporters differ about both.
fn manifest_name(descriptor: &str, names: &[String]) -> String {
    let exact = with_extension(descriptor, "mf");
    if names.contains(&exact) {
        return exact;
    }
    let is_manifest = |name: &&String| name.to_ascii_lowercase().ends_with(".mf") && !name.contains('/');
    let mut found = names.iter().filter(is_manifest);
    let same = found.clone().find(|name| name.eq_ignore_ascii_case(&exact));
    let only = || found.next().filter(|_| found.next().is_none());
    same.or_else(only).cloned().unwrap_or(exact)
}

fn open_manifest(files: &Files, name: &str) -> Result<Option<Manifest>> {
    let Some(input) = files.open(name)? else { return Ok(None) };
    let text = read_small(input, manifest::MAX_LEN, "the manifest")?;
    Manifest::parse(&text).map(Some)
}

/// Refuses a manifest that lists a file which is missing.
fn check_complete(manifest: &Manifest, files: &Files, names: &[String]) -> Result<()> {
    let names: std::collections::HashSet<&str> = names.iter().map(String::as_str).collect();
    match manifest.lines.iter().find(|line| !names.contains(line.name.as_str())) {
        // The error of a file that is expected.
        Some(line) => files.expect(&line.name).map(drop),
        None => Ok(()),
    }
}

impl ImageSource for PackageSource {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        let mut losses = lock(&self.losses).clone();
        for member in &self.disks {
            let own = member.disk.disk.iter().flat_map(imgtool_core::Disk::losses);
            let known = member.disk.losses.iter().cloned();
            losses.extend(known.chain(own).map(|loss| Loss { device: member.disk.device.id, ..loss }));
        }
        losses
    }

    fn notes(&self) -> Vec<String> {
        let note = |disk: &PackagedDisk| {
            let notes = disk.disk.as_ref().map_or_else(Vec::new, |open| open.image().notes());
            let name = disk.device.name.clone();
            notes.into_iter().map(move |note| format!("{name}: {note}"))
        };
        self.disks().flat_map(note).collect()
    }

    fn verify(&self) -> Result<()> {
        for member in self.disks.iter().filter(|member| member.was_asked.load(Ordering::Relaxed)) {
            if member.was_verified.swap(true, Ordering::Relaxed) {
                continue;
            }
            let device = &member.disk.device;
            let own = member.disk.disk.as_ref().map_or(Ok(()), |open| open.image().verify());
            match own.and_then(|()| self.verify_disk(&member.disk)).map_err(|e| e.device(&*device.name)) {
                Err(error) if self.salvage && error.kind() == imgtool_core::ErrorKind::Corrupt => {
                    lock(&self.losses).push(Loss {
                        class: LossClass::Unverified,
                        offset: None,
                        compressed_offset: None,
                        device: device.id,
                        guest: 0..device.size,
                        reason: error.message().to_owned(),
                    });
                }
                result => result?,
            }
        }
        Ok(())
    }
}

impl RandomAccess for PackageSource {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.content(device)?.extents(range)
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.content(device)?.map(range)
    }

    fn rough_extents(&self, device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.content(device)?.rough_extents(range, resolution)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.content(device)?.read_at(buf, guest_offset)
    }

    fn read_granule(&self, device: DeviceId) -> u64 {
        let open = self.disk(device).ok().and_then(|disk| disk.disk.as_ref());
        open.map_or(1, imgtool_core::Disk::read_granule)
    }

    fn reader_memory(&self, device: DeviceId) -> u64 {
        let open = self.disk(device).ok().and_then(|disk| disk.disk.as_ref());
        open.map_or(0, imgtool_core::Disk::reader_memory)
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        self.content(device).ok()?.locate(range)
    }
}
