//! The XML of a libvirt domain beside the disks of a machine.

use std::path::{Path, PathBuf};

use imgtool_core::machine::DriveKind;
use imgtool_core::{Attachment, DeviceKind, Error, Machine, Result};
use imgtool_engine::{Destination, Note, Plan, PlannedFile, PlannedOutput, names, sources};
use imgtool_machine::libvirt::{self, DiskSource};

use crate::compat;

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
    for (index, source) in plan.sources.iter().enumerate() {
        let Some(machine) = &source.opened.image.info().machine else { continue };
        let machine = sources::of_selected(machine, index, &plan.selected);
        let Some(directory) = directory(plan, index) else { continue };
        let disks = disks(plan, index, &machine, &directory)?;
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

/// Returns the disks of a source that are new files of a format for machines. The firmware's variables and the TPM's
/// state are no disks.
fn disks(plan: &Plan, source: usize, machine: &Machine, directory: &Path) -> Result<Vec<DiskFile>> {
    let mut disks = Vec::new();
    for (output, disk) in outputs_of(plan, source) {
        let (Destination::New(path), format) = (&output.destination, output.format.driver.name()) else {
            continue;
        };
        let Some(format) = FORMATS.iter().find(|known| **known == format) else { continue };
        let path =
            std::path::absolute(path).map_err(|e| Error::io("find out the path", e).path(directory))?;
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
