//! The XML of a libvirt domain beside the disks of a machine.

use std::path::{Component, Path, PathBuf};

use imgtool_core::machine::DriveKind;
use imgtool_core::{Attachment, DeviceKind, Error, Machine, Result};
use imgtool_engine::{Destination, Note, Plan, PlannedFile, PlannedOutput, TargetFormat, names, sources};
use imgtool_machine::libvirt::{self, DiskSource};

use crate::compat;
use crate::proxmox::CONFIG_NAME;

/// Formats of disks that libvirt runs machines from.
const FORMATS: [&str; 2] = ["qcow2", "raw"];

/// A disk in a directory: the name of its device, its path and its format.
struct DiskFile {
    device: String,
    path: PathBuf,
    format: &'static str,
}

/// Adds the XML for each machine whose disks are written into a directory, and notes on what it does not
/// hold.
///
/// # Errors
/// If the current directory can't be found out: the XML has absolute paths.
pub(super) fn add(plan: &mut Plan) -> Result<()> {
    if compat::is_on() {
        return Ok(());
    }
    note_left_out(plan);
    for (index, source) in plan.sources.iter().enumerate() {
        let Some(machine) = &source.opened.image.info().machine else { continue };
        let machine = sources::of_selected(machine, index, &plan.selected);
        let Some(directory) = directory(plan, index) else { continue };
        if let Some(device) = encrypted(plan, index) {
            let text =
                format!("no XML for libvirt: disk {device} is encrypted, and its secret is defined apart");
            plan.layout.notes.push(Note::Text(text));
            continue;
        }
        let disks = disks(plan, index, &machine, &directory)?;
        if let Some(disk) = disks.iter().find(|disk| disk.path.to_str().is_none()) {
            let text = format!("no XML for libvirt: the path of {} is no text in UTF-8", disk.device);
            plan.layout.notes.push(Note::Text(text));
            continue;
        }
        // A domain without any of its disks would be of no use.
        if !disks.iter().any(|disk| machine.drive(&disk.device).is_some()) {
            continue;
        }
        let (name, text, lost) = domain(plan, &directory, &machine, &disks);
        plan.layout.notes.extend(lost.into_iter().map(|line| Note::Text(format!("{name} lacks {line}"))));
        let attachment = Attachment { name: name.clone(), data: text.into_bytes() };
        plan.layout.files.push(PlannedFile { path: directory.join(name), attachment });
    }
    Ok(())
}

/// Returns the outputs with the disks of a source.
fn outputs_of(
    plan: &Plan,
    source: usize,
) -> impl Iterator<Item = (&PlannedOutput, &imgtool_engine::SelectedDisk)> {
    plan.layout.outputs.iter().filter_map(move |output| {
        let [slot] = output.disks.as_slice() else { return None };
        let disk = plan.selected.get(slot.index())?;
        (disk.source == source && disk.device.kind == DeviceKind::Disk).then_some((output, disk))
    })
}

/// Returns the directory that receives the disks of a source, if one does.
fn directory(plan: &Plan, source: usize) -> Option<PathBuf> {
    let directories = || plan.layout.machine_directories.iter().chain(&plan.layout.directory);
    outputs_of(plan, source).find_map(|(output, _)| {
        let parent = output.destination.path()?.parent()?;
        directories().find(|directory| directory.as_path() == parent).cloned()
    })
}

/// Notes the files of the sources beside the description of the machine that a package has no place for.
fn note_left_out(plan: &mut Plan) {
    let is_package =
        |format: &TargetFormat| format.is_archive() && !format.driver.capabilities().attachments();
    if !plan.layout.outputs.iter().any(|output| is_package(&output.format)) {
        return;
    }
    let is_description =
        |file: &&Attachment| file.name == CONFIG_NAME || file.name.to_ascii_lowercase().ends_with(".ovf");
    let files =
        plan.sources.iter().flat_map(|source| source.attachments()).filter(|file| !is_description(file));
    let notes: Vec<Note> = files
        .map(|file| Note::Text(format!("'{}' is left out: a package has no place for it", file.name)))
        .collect();
    plan.layout.notes.extend(notes);
}

/// Returns the name of a disk of a source that is written encrypted. A domain names the secret of each such
/// disk by an identifier that only the host's libvirt has.
fn encrypted(plan: &Plan, source: usize) -> Option<String> {
    let mut outputs =
        outputs_of(plan, source).filter(|(output, _)| FORMATS.contains(&output.format.driver.name()));
    outputs.find_map(|(output, disk)| output.format.writer.encrypts().then(|| disk.name.clone()))
}

/// Returns an absolute path without `..`, which libvirt's programs show and compare as text. Symbolic links
/// of the directories before it are followed, as `..` demands.
fn plain_path(path: &Path) -> std::io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    if !path.components().any(|part| part == Component::ParentDir) {
        return Ok(path);
    }
    // The directories at the end may not exist yet.
    for ancestor in path.ancestors().skip(1) {
        let (Ok(known), Ok(rest)) = (ancestor.canonicalize(), path.strip_prefix(ancestor)) else { continue };
        if !rest.components().any(|part| part == Component::ParentDir) {
            return Ok(known.join(rest));
        }
    }
    Ok(path)
}

/// Returns the disks of a source that are new files of a format for machines. The firmware's variables and
/// the TPM's state are no disks.
fn disks(plan: &Plan, source: usize, machine: &Machine, directory: &Path) -> Result<Vec<DiskFile>> {
    let mut disks = Vec::new();
    for (output, disk) in outputs_of(plan, source) {
        let (Destination::New(path), format) = (&output.destination, output.format.driver.name()) else {
            continue;
        };
        let Some(format) = FORMATS.iter().find(|known| **known == format) else { continue };
        let path = plain_path(path).map_err(|e| Error::io("find out the path", e).path(directory))?;
        let is_state = machine.drive(&disk.name).is_some_and(|drive| drive.kind != DriveKind::Disk);
        if output.format.outer.is_none() && !is_state {
            disks.push(DiskFile { device: disk.name.clone(), path, format });
        }
    }
    Ok(disks)
}

/// Returns the name of the XML, its text, and what it does not hold.
fn domain(
    plan: &Plan,
    directory: &Path,
    machine: &Machine,
    disks: &[DiskFile],
) -> (String, String, Vec<String>) {
    let paths: Vec<_> = disks.iter().map(|disk| disk.path.to_string_lossy()).collect();
    let disks: Vec<DiskSource<'_>> = disks
        .iter()
        .zip(&paths)
        .map(|(disk, path)| DiskSource { device: &disk.device, path, format: disk.format })
        .collect();
    let printed = libvirt::print(machine, &disks);
    let stem = names::safe(&machine.name, "vm");
    let is_taken = |name: &str| {
        let path = directory.join(name);
        let outputs = plan.layout.outputs.iter().filter_map(|output| output.destination.path());
        outputs.chain(plan.layout.files.iter().map(|file| &*file.path)).any(|other| other == path)
    };
    let mut names = std::iter::once(format!("{stem}.xml")).chain((2..).map(|n| format!("{stem}-{n}.xml")));
    let name = names.find(|name| !is_taken(name)).unwrap_or_default();
    (name, printed.text, printed.lost)
}
