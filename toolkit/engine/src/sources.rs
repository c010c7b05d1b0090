//! The sources of a conversion: opens the images that the user named, selects their disks and names them.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::Path;

use imgtool_core::device::meant;
use imgtool_core::machine::DriveKind;
use imgtool_core::{
    Attachment, CancelToken, Device, DeviceKind, Error, FilePart, Input, Location, Machine, OpenOptions,
    Registry, Result, Secret, Secrets, Slot, suggest,
};
use imgtool_storage::open::OpenInput;

use crate::chosen::{self, ChosenChain};
use crate::format::TargetFormat;
use crate::monitor::Monitor;
use crate::open::{self, Opened};
use crate::request::Request;
use crate::{names, spool};

/// A source, as the user named it.
#[derive(Debug, Clone)]
pub struct SourceRequest {
    /// Name for the source's device, if the user gave one.
    pub name: Option<String>,
    /// Location.
    pub location: Location,
    /// Format of this source, unless the user states one for all sources.
    pub format: Option<String>,
    /// Passphrase of this source, if it has one of its own; no other is tried then.
    pub secret: Option<Secret>,
    /// Part of the file that is the image; `None` for all of it.
    pub part: Option<FilePart>,
    /// Backing images in place of those that the source names.
    pub backing: ChosenChain,
}

impl SourceRequest {
    /// Creates a source whose device is named by the image or the file.
    pub fn new(location: impl Into<Location>) -> Self {
        let (format, secret, part) = (None, None, None);
        Self { name: None, location: location.into(), format, secret, part, backing: ChosenChain::default() }
    }

    /// Returns `options` with the passphrase, the part of the file and the backing images of this source.
    pub fn options(&self, registry: &Registry, options: &OpenOptions) -> OpenOptions {
        let own = self.secret.clone().map(Secrets::from);
        let secrets = own.unwrap_or_else(|| options.secrets.clone());
        OpenOptions { secrets, part: self.part, ..chosen::options(registry, &self.backing, options) }
    }

    /// Parses `LOCATION` or `NAME=LOCATION`. The path of an existing file is always a location.
    pub fn parse(text: &OsStr) -> Self {
        match text.to_str().and_then(|text| text.split_once('=')) {
            Some((name, location))
                if !name.is_empty()
                    && !name.contains('/')
                    && !location.is_empty()
                    && !Path::new(text).exists() =>
            {
                let name = Some(name.to_owned());
                Self { name, ..Self::new(Location::source(OsStr::new(location))) }
            }
            _ => Self::new(Location::source(text)),
        }
    }
}

/// An open source.
#[derive(Debug)]
pub struct OpenSource {
    /// Name for the source's device, if the user gave one.
    pub name: Option<String>,
    /// The open image.
    pub opened: Opened,
}

impl OpenSource {
    /// True if the image holds a machine: its disks and configurations.
    pub fn holds_machine(&self) -> bool {
        self.opened.driver.capabilities().is_archive()
    }

    /// Returns the configurations of the image.
    pub fn attachments(&self) -> &[Attachment] {
        &self.opened.image.info().attachments
    }
}

/// A disk selected for the conversion. Its index among all selected disks is its [`Slot`].
#[derive(Debug, Clone)]
pub struct SelectedDisk {
    /// Index of its source.
    pub source: usize,
    /// Device as the source describes it.
    pub device: Device,
    /// Name in the output: of a file, or of a device in an archive.
    pub name: String,
}

impl SelectedDisk {
    /// Returns the names by which the user may choose the disk: in the output, and in the source.
    pub(crate) fn names(&self) -> [&str; 2] {
        [&self.name, &self.device.name]
    }
}

/// Returns the machine of the only source that describes one, without the disks that are not `selected`, by
/// the names that the selected ones have in the output.
pub fn machine(sources: &[OpenSource], selected: &[SelectedDisk]) -> Option<Machine> {
    let mut machines = (0..).zip(sources).filter_map(|(index, source)| {
        let machine = source.opened.image.info().machine.as_ref()?;
        Some((index, machine))
    });
    let (Some((source, machine)), None) = (machines.next(), machines.next()) else { return None };
    Some(of_selected(machine, source, selected))
}

/// Returns the machine of a source as [`machine`] does, whatever the other sources describe.
pub fn of_selected(machine: &Machine, source: usize, selected: &[SelectedDisk]) -> Machine {
    machine.clone().with_devices(|name| {
        let mut disks = selected.iter().filter(|disk| disk.source == source);
        disks.find(|disk| disk.device.name == name).map(|disk| disk.name.clone())
    })
}

/// Opens the sources, in order. Copies a stream of unknown length to temporary storage if `target` needs the
/// length in advance, and every stream if the sources are joined.
///
/// # Errors
/// If a source can't be opened, or standard input is named twice.
pub(crate) fn open_sources(
    registry: &Registry,
    request: &Request,
    options: &OpenOptions,
    target: &TargetFormat,
    monitor: &dyn Monitor,
    cancel: &CancelToken,
) -> Result<Vec<OpenSource>> {
    let requests = &request.sources;
    if requests.iter().filter(|request| request.location == Location::Stdin).count() > 1 {
        return Err(Error::usage("standard input can be only one of the sources"));
    }
    let memory = options.memory.shared_by(requests.len());
    let options = &OpenOptions { memory, ..options.clone() };
    let stated = request.source_format.as_deref();
    let open_one = |source: &SourceRequest| {
        let format = stated.or(source.format.as_deref());
        let options = &source.options(registry, options);
        let input = open::open_input(registry, &source.location, format, options)?;
        let input = input.cancelled_by(cancel.clone());
        let is_spooled = request.join || must_be_spooled(registry, &input, format, target)?;
        let input = match is_spooled {
            true => spool::spool(input, monitor),
            false => in_one_pass(registry, input, format, request),
        };
        let input = input.map_err(|e| e.path(&source.location))?;
        let opened = open::open_watched(registry, input, format, options, monitor)?;
        chosen::check(&opened, &source.backing)?;
        // Opening has decoded parts of the file, and the other sources come first.
        opened.release();
        Ok(OpenSource { name: source.name.clone(), opened })
    };
    requests.iter().map(open_one).collect()
}

/// True for a stream, if the target needs in advance the length of one that has none, or needs one disk of an
/// archive after the other.
fn must_be_spooled(
    registry: &Registry,
    input: &OpenInput,
    format: Option<&str>,
    target: &TargetFormat,
) -> Result<bool> {
    let needs_order = target.writer.needs_guest_order();
    if !input.input.is_stream() || target.driver.capabilities().open_ended && !needs_order {
        return Ok(false);
    }
    let head = input.input.head()?;
    let driver = match format {
        Some(name) => registry.get(name)?,
        None => registry.probe(&head, input.input.len())?.0,
    };
    let is_endless = driver.capabilities().sized_by_end && driver.reads_stream(&head);
    let is_mixed = needs_order && driver.capabilities().is_archive();
    Ok(is_endless || is_mixed)
}

/// Makes a stream of an archive on a server whose disks are all copied: an index of it would take a request for
/// each of its extents. Returns any other input unchanged.
fn in_one_pass(
    registry: &Registry,
    input: OpenInput,
    format: Option<&str>,
    request: &Request,
) -> Result<OpenInput> {
    let is_far = matches!(input.input.location(), Location::Url(_)) && !input.input.is_stream();
    let needs_all = request.disks.is_empty() && input.compression.is_empty();
    if !is_far || !needs_all {
        return Ok(input);
    }
    let head = input.input.head()?;
    let driver = match format {
        Some(name) => registry.get(name)?,
        None => registry.probe(&head, input.input.len())?.0,
    };
    let can = driver.capabilities();
    if !can.is_archive() || can.container || !driver.reads_stream(&head) {
        return Ok(input);
    }
    let (location, cancel) = (input.input.location().clone(), input.input.cancel_token());
    let stream = input.input.into_stream()?;
    Ok(OpenInput { input: Input::from_stream(location, stream).cancelled_by(cancel), ..input })
}

/// Selects the disks that these names mean ([`meant`]); all disks if `names` is empty.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a name that no device has, or if the user gave a name to a source
/// without exactly one device.
pub fn select(registry: &Registry, sources: &[OpenSource], names: &[String]) -> Result<Vec<SelectedDisk>> {
    let mut all: Vec<SelectedDisk> = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let info = source.opened.image.info();
        if source.name.is_some() && info.devices.len() != 1 {
            return Err(Error::usage(format!(
                "NAME=PATH names one device, and this image holds {}",
                info.devices.len()
            ))
            .path(&source.opened.location));
        }
        all.extend(info.devices.iter().map(|device| SelectedDisk {
            source: index,
            device: device.clone(),
            name: device_name(registry, source, device),
        }));
    }
    let found = |name: &String| {
        meant(name, all.iter().flat_map(SelectedDisk::names)).ok_or_else(|| {
            let devices = all.iter().map(|disk| disk.name.as_str());
            Error::usage(format!("no device is called '{name}'"))
                .hint(suggest::hint(name, "devices", devices))
        })
    };
    let names: HashSet<String> =
        names.iter().map(|name| found(name).map(str::to_owned)).collect::<Result<_>>()?;
    let is_selected =
        |disk: &SelectedDisk| names.is_empty() || disk.names().iter().any(|name| names.contains(*name));
    all.retain(is_selected);
    Ok(all)
}

/// Returns the name of a device: from the user if given, otherwise from the archive, or, in a format without
/// names, from the file name.
fn device_name(registry: &Registry, source: &OpenSource, device: &Device) -> String {
    if let Some(name) = &source.name {
        return name.clone();
    }
    if source.opened.driver.capabilities().is_archive() {
        return device.name.clone();
    }
    names::safe(&open::stem(registry, &source.opened.location), "disk")
}

/// Leaves out the firmware variables and the TPM state of a machine: a platform that imports its disks makes its own,
/// and would take these for disks of the guest. Returns a note for each. Keeps everything if nothing else is selected.
pub(crate) fn leave_out_platform_state(
    sources: &[OpenSource],
    selected: &mut Vec<SelectedDisk>,
) -> Vec<String> {
    let state_of = |disk: &SelectedDisk| {
        let machine = sources[disk.source].opened.image.info().machine.as_ref()?;
        match machine.drive(&disk.device.name)?.kind {
            DriveKind::EfiVars => Some("firmware variables"),
            DriveKind::TpmState => Some("the state of a TPM"),
            _ => None,
        }
    };
    if selected.iter().all(|disk| state_of(disk).is_some()) {
        return Vec::new();
    }
    let note = |disk: &SelectedDisk| {
        let what = state_of(disk)?;
        Some(format!("{} was left out: {what}, for which the target has no place", disk.device.name))
    };
    let notes = selected.iter().filter_map(note).collect();
    selected.retain(|disk| state_of(disk).is_none());
    notes
}

/// Device name by which readers of archives recognise the state of a running guest.
pub const VMSTATE: &str = "vmstate";

/// Makes the names unique and, unless the user chose them, acceptable to every reader of archives. Turns a
/// device called [`VMSTATE`] into guest state. With `apart`, each source gets an archive of its own. Returns a note for
/// each changed name.
pub(crate) fn name_for_archive(
    sources: &[OpenSource],
    selected: &mut [SelectedDisk],
    apart: bool,
) -> Vec<String> {
    let mut notes = Vec::new();
    let mut used = HashSet::new();
    for disk in selected {
        let by_user = sources[disk.source].name.is_some();
        let mut plain = if by_user { disk.name.clone() } else { names::portable(&disk.name) };
        // The name of a disk's file in a package says nothing about its content.
        if !by_user && plain == VMSTATE && is_drive(&sources[disk.source], &disk.device) {
            plain = format!("disk-{VMSTATE}");
        }
        let mut name = plain.clone();
        let mut number = 2u64;
        let archive = apart.then_some(disk.source);
        while !used.insert((archive, name.clone())) {
            name = format!("{plain}-{number}");
            number += 1;
        }
        if name != disk.name {
            notes.push(format!("device '{}' is called '{name}' in the archive", disk.name));
        }
        if name == VMSTATE {
            disk.device.kind = DeviceKind::VmState;
        }
        disk.name = name;
    }
    notes
}

/// True if the machine of the source has the device as a disk.
fn is_drive(source: &OpenSource, device: &Device) -> bool {
    let machine = source.opened.image.info().machine.as_ref();
    let drive = machine.and_then(|machine| machine.drive(&device.name));
    drive.is_some_and(|drive| drive.kind == DriveKind::Disk)
}

/// Returns the selected disks of one source, with their slots.
pub(crate) fn of_source(
    selected: &[SelectedDisk],
    source: usize,
) -> impl Iterator<Item = (Slot, &SelectedDisk)> {
    (0..).map(Slot).zip(selected).filter(move |(_, disk)| disk.source == source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_name_before_an_equals_sign() {
        let parse = |text: &str| SourceRequest::parse(OsStr::new(text));
        assert_eq!(parse("scsi0=a/b=c.raw").name.as_deref(), Some("scsi0"));
        assert_eq!(parse("scsi0=a/b=c.raw").location, "a/b=c.raw".into());
        assert_eq!(parse("d/a=b.raw").name, None);
        assert_eq!(parse("=b.raw").name, None);
        assert_eq!(parse("x=-").location, Location::Stdin);
        assert_eq!(parse("-").name, None);
    }
}
