//! The configurations of an archive: files of the user, those of the sources, and the one that Proxmox VE
//! needs.

use std::path::Path;

use imgtool_core::{Attachment, DeviceKind, Error, Result, ResultExt};
use imgtool_engine::{Destination, Note, OpenConversion, OpenSource, Plan, SelectedDisk, sources};
use imgtool_machine::description;

use crate::args::ConvertArgs;
use crate::commands::options;
use crate::proxmox::{self, Base, CONFIG_NAME, FIREWALL_NAME, GuestConfig};

/// Name of the format that Proxmox VE restores.
const PROXMOX_FORMAT: &str = "vma";

/// Adds the configurations that the arguments ask for, and returns notes on them.
///
/// # Errors
/// If a file can't be read, two files are a guest's configuration, or Proxmox VE does not take a setting.
pub(super) fn add(args: &ConvertArgs, conversion: &mut OpenConversion<'_>) -> Result<Vec<String>> {
    let for_proxmox = conversion.format().driver.name() == PROXMOX_FORMAT;
    let mut base = Base::Nothing;
    let mut notes = Vec::new();
    for path in &args.devices.config {
        let file = read(path)?;
        match guest_config(&file).filter(|_| for_proxmox) {
            Some(config) => {
                if !matches!(base, Base::Nothing) {
                    return Err(two_guests(path, &base));
                }
                base = Base::File(path.clone(), config.in_file(path)?, file);
            }
            None if for_proxmox && description::is_one(&file.data) => {
                if !matches!(base, Base::Nothing) {
                    return Err(two_guests(path, &base));
                }
                base = Base::of_machine(&description::parse(&file.data).in_file(path)?);
            }
            None => {
                let file = firewall(file, for_proxmox, &mut notes);
                if for_proxmox && file.name != FIREWALL_NAME && file.name != CONFIG_NAME {
                    notes.push(format!(
                        "{}: stored as it is; not a guest's configuration of Proxmox VE, whose lines are 'KEY: VALUE'",
                        file.name
                    ));
                }
                conversion.attachments.push(file);
            }
        }
    }
    if for_proxmox {
        add_guest(args, conversion, base, &mut notes)?;
    }
    Ok(notes)
}

/// Returns the error for a second description of a guest.
fn two_guests(path: &Path, first: &Base) -> Error {
    let first = match first {
        Base::File(first, ..) => first.display().to_string(),
        _ => "another file".to_owned(),
    };
    Error::usage(format!("is a guest's configuration, as is {first}"))
        .path(path)
        .hint("an archive holds one guest: give one of them")
}

/// Adds the guest's configuration to an archive for Proxmox VE.
fn add_guest(
    args: &ConvertArgs,
    conversion: &mut OpenConversion<'_>,
    mut base: Base,
    notes: &mut Vec<String>,
) -> Result<()> {
    let settings = &args.devices.proxmox;
    if conversion.attachments.iter().any(|file| file.name == CONFIG_NAME) {
        if settings.is_empty() && matches!(base, Base::Nothing) {
            return Ok(());
        }
        return Err(Error::usage(format!("{CONFIG_NAME} of --config is not a configuration of Proxmox VE"))
            .hint("its lines are 'KEY: VALUE', as in /etc/pve/qemu-server/100.conf"));
    }
    if matches!(base, Base::Nothing) && !settings.is_empty() {
        base = of_source(conversion)?;
    }
    if matches!(base, Base::Nothing) && !has_guest(conversion) {
        base = of_machine(conversion);
    }
    let dest = args.paths.last().filter(|_| args.paths.len() > 1).map(Path::new);
    if matches!(base, Base::Nothing) && settings.is_empty() && !needs_minimal(conversion, dest) {
        return Ok(());
    }
    let labels = labels(conversion);
    let packed = proxmox::pack(&base, settings, conversion.selected(), &labels, dest)?;
    conversion.attachments.push(packed.config);
    notes.extend(packed.notes);
    Ok(())
}

/// Returns what the user calls each disk: the file, or the device of an archive.
fn labels(conversion: &mut OpenConversion<'_>) -> Vec<String> {
    let disks = conversion.selected().to_vec();
    let label = |disk: &SelectedDisk| {
        let source = &conversion.sources()[disk.source];
        if source.holds_machine() { disk.name.clone() } else { source.opened.location.name().into_owned() }
    };
    disks.iter().map(label).collect()
}

/// True for an archive of plain disks, or with the name of a backup of Proxmox VE, that gets no configuration from
/// anywhere; false for an archive that is only packed again.
fn needs_minimal(conversion: &mut OpenConversion<'_>, dest: Option<&Path>) -> bool {
    let has_disk = conversion.selected().iter().any(|disk| disk.device.kind == DeviceKind::Disk);
    let is_plain = !conversion.sources().iter().any(OpenSource::holds_machine);
    let mut sources = conversion.sources().iter();
    let has_files =
        !conversion.attachments.is_empty() || sources.any(|source| !source.attachments().is_empty());
    let is_backup = dest.is_some_and(proxmox::is_for_proxmox);
    has_disk && (is_plain || is_backup) && (!has_files || is_plain && is_backup)
}

/// Returns the configuration of the only source that has one. Keeps the other files of that source.
fn of_source(conversion: &mut OpenConversion<'_>) -> Result<Base> {
    let holds = |source: &&OpenSource| source.attachments().iter().any(|file| file.name == CONFIG_NAME);
    let mut with_config = conversion.sources().iter().filter(holds);
    let (Some(source), None) = (with_config.next(), with_config.next()) else { return Ok(Base::Nothing) };
    let files = source.attachments().to_vec();
    let mut base = Base::Nothing;
    for file in files {
        let config = (file.name == CONFIG_NAME).then(|| guest_config(&file)).flatten();
        match config {
            Some(config) => base = Base::Source(config?, file),
            // The one that is made replaces it.
            None if file.name == CONFIG_NAME => {}
            None if conversion.attachments.iter().any(|known| known.name == file.name) => {}
            None => conversion.attachments.push(file),
        }
    }
    Ok(base)
}

/// True if a source has the guest's configuration.
fn has_guest(conversion: &OpenConversion<'_>) -> bool {
    let mut files = conversion.sources().iter().flat_map(OpenSource::attachments);
    files.any(|file| file.name == CONFIG_NAME)
}

/// Returns the machine of the only source that describes one in another dialect. Keeps the files of that source.
fn of_machine(conversion: &mut OpenConversion<'_>) -> Base {
    let selected = conversion.selected().to_vec();
    let Some(machine) = sources::machine(conversion.sources(), &selected) else { return Base::Nothing };
    let files = conversion.sources().iter().flat_map(OpenSource::attachments);
    let is_new = |file: &&Attachment| !conversion.attachments.iter().any(|known| known.name == file.name);
    let files: Vec<Attachment> = files.filter(is_new).cloned().collect();
    conversion.attachments.extend(files);
    Base::of_machine(&machine)
}

fn read(path: &Path) -> Result<Attachment> {
    let name = path.file_name().ok_or_else(|| Error::usage("is not a file name").path(path))?;
    let data = std::fs::read(path).map_err(|e| Error::io("read the configuration", e)).in_file(path)?;
    Ok(Attachment { name: name.to_string_lossy().into_owned(), data })
}

/// Parses a file as a guest's configuration; `None` if it is something else.
fn guest_config(file: &Attachment) -> Option<Result<GuestConfig>> {
    let text = std::str::from_utf8(&file.data).ok()?;
    let config = GuestConfig::parse(text)?;
    Some(match &config.bad_line {
        Some((number, line)) => {
            Err(Error::usage(format!("line {number} is not 'KEY: VALUE', or its key occurs twice: '{line}'"))
                .hint("Proxmox VE ignores such a line: correct it or take it out"))
        }
        None => Ok(config),
    })
}

/// Gives firewall rules (`/etc/pve/firewall/100.fw`) the name under which `qmrestore` finds them.
fn firewall(file: Attachment, for_proxmox: bool, notes: &mut Vec<String>) -> Attachment {
    if !for_proxmox || !file.name.ends_with(".fw") || file.name == FIREWALL_NAME {
        return file;
    }
    notes.push(format!("{} is called {FIREWALL_NAME} in the archive", file.name));
    Attachment { name: FIREWALL_NAME.to_owned(), data: file.data }
}

/// Adds notes on what Proxmox VE will refuse when it restores an archive: its name, or a configuration that
/// does not match its disks.
///
/// # Errors
/// If SOURCE_DATE_EPOCH is not valid.
pub(super) fn note_on_restoring(args: &ConvertArgs, plan: &mut Plan) -> Result<()> {
    let epoch = options::source_date_epoch()?;
    let vmid = args.devices.config.iter().find_map(|path| proxmox::vmid_of_config(path));
    let mut notes = Vec::new();
    for output in plan.layout.outputs.iter().filter(|output| output.format.driver.name() == PROXMOX_FORMAT) {
        let Destination::New(path) = &output.destination else { continue };
        let compression = output.format.outer.map(|outer| outer.compression);
        let Some(config) = output.attachments.iter().find(|config| config.name == CONFIG_NAME) else {
            continue;
        };
        notes.extend(proxmox::note_on_name(path, compression, vmid, epoch));
        let disks: Vec<&str> = output
            .disks
            .iter()
            .map(|slot| &plan.selected[slot.index()])
            .filter(|disk| disk.device.kind == DeviceKind::Disk)
            .map(|disk| &*disk.name)
            .collect();
        notes.extend(proxmox::notes_on_map(&config.data, &disks));
    }
    plan.layout.notes.extend(notes.into_iter().map(Note::Text));
    Ok(())
}
