//! `--for PLATFORM`: chooses format, options, sizes and names of the outputs, and compares the result with
//! the rules of the platform before the outputs get their names.

use std::path::Path;

use imgtool_core::{CancelToken, Compress, DeviceKind, Error, Location, Registry, Result};
use imgtool_engine::{
    Destination, FinishedOutput, Inspector, Note, Plan, PlannedOutput, Request, format, open,
};
use imgtool_platform::{Form, Platform, Purpose, Severity, Subject};
use imgtool_storage::outer;

use super::new_size;
use crate::args::{ConvertArgs, NewSize};
use crate::commands::check::platform::{line, place};
use crate::commands::options;
use crate::report::exact_size;
use crate::{compat, proxmox};

/// A platform, and the form that its images get.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    platform: Platform,
    form: &'static Form,
}

/// Chooses a form, and completes the request with its format and options.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a flag or a name that contradicts the platform.
pub(super) fn choose(
    args: &ConvertArgs,
    registry: &Registry,
    platform: Platform,
    request: &mut Request,
) -> Result<Target> {
    refuse_flags(args, platform)?;
    let form = form(registry, platform, request)?;
    request.format = Some(form.format.to_owned());
    let target = Target { platform, form };
    target.set_compression(registry, request)?;
    target.set_options(request)?;
    if let Some(NewSize::Exact(size)) = args.target.size
        && form.size.is_strict
        && form.size.round_up(size) != Some(size)
    {
        let best = form.size.round_up(size).map_or(form.size.max, |size| size);
        return Err(target
            .contradicts(&format!("--size {size}"))
            .hint(format!("the nearest size is {best}")));
    }
    Ok(target)
}

/// Refuses flags that write into something that exists, or make an image that needs another.
fn refuse_flags(args: &ConvertArgs, platform: Platform) -> Result<()> {
    let has_backing = args.target.backing.is_some()
        || args.target.options.iter().any(|option| option.contains("backing_file="));
    let conflicts = [
        (args.target.no_create, "-n", "it gets new images alone"),
        (!args.devices.target.is_empty(), "--target", "DEST is the place of all disks"),
        (has_backing, "a backing file", "it takes no image that needs another"),
        (compat::is_on(), "--compat", "qemu-img knows no platforms"),
    ];
    match conflicts.iter().find(|(is_given, ..)| *is_given) {
        Some((_, flag, reason)) => {
            Err(Error::usage(format!("--for {platform} and {flag} can't be combined: {reason}")))
        }
        None => Ok(()),
    }
}

/// Returns the form of the new images: that of the stated format, of the extension of DEST, or the default.
fn form(registry: &Registry, platform: Platform, request: &Request) -> Result<&'static Form> {
    let refusal = |what: &str| {
        Error::usage(format!("--for {platform} and {what} contradict each other"))
            .hint(format!("{platform} takes {}", platform.forms_in_words()))
    };
    let stated = request.format.as_deref().map(|name| registry.get(name)).transpose()?;
    let stated = stated.map(|driver| driver.name());
    let mut forms =
        platform.forms().filter(|form| stated.is_none_or(|stated| form.format == stated)).peekable();
    if forms.peek().is_none() {
        return Err(refusal(&format!("the format {}", stated.unwrap_or_default())));
    }
    let forms: Vec<&'static Form> = forms.collect();
    if let Some(dest) = request.dest.as_ref().filter(|dest| !format::is_directory(dest))
        && let Some(name) = dest.file_name()
    {
        let named = open::driver_by_name(registry, dest).map(|driver| driver.name());
        let takes = |form: &&&Form| form.takes_extension(&name);
        let same = forms.iter().filter(takes).find(|form| named == Some(form.format));
        if let Some(form) = same.or_else(|| forms.iter().find(takes)) {
            return Ok(form);
        }
        if stated.is_none() && named.is_some() || outer::by_name(dest).is_some() {
            return Err(refusal(&format!("the name '{name}'")));
        }
    }
    let purpose = if holds_machine(registry, request) { Purpose::Machine } else { Purpose::Disk };
    let default = forms.iter().find(|form| form.purpose == purpose);
    Ok(default.or(forms.first()).copied().unwrap_or(&platform.rules.forms[0]))
}

/// True if the sources are the disks of a machine: several, or an archive. The name of a file decides.
fn holds_machine(registry: &Registry, request: &Request) -> bool {
    if request.disks.len() == 1 || request.join {
        return false;
    }
    let is_archive = |location: &Location| {
        let named = match &request.source_format {
            Some(name) => registry.get(name).ok(),
            None => open::driver_by_name(registry, location),
        };
        // A tar archive describes no machine.
        named.is_some_and(|driver| driver.capabilities().is_archive() && driver.name() != "tar")
    };
    request.sources.len() > 1 || request.sources.iter().any(|source| is_archive(&source.location))
}

impl Target {
    /// Returns the error for something that the user stated and the platform doesn't take.
    fn contradicts(&self, what: &str) -> Error {
        Error::usage(format!("--for {} and {what} contradict each other", self.platform))
    }

    /// Says in a few words what was chosen.
    pub(super) fn in_words(&self) -> String {
        let Form { format, options, compressions, .. } = self.form;
        let compression = compressions.first().copied().flatten().map(|name| format!(" in {name}"));
        let options = options.iter().map(|choice| format!(", {}={}", choice.key, choice.value));
        format!(
            "for {}: {format}{}{}",
            self.platform,
            compression.unwrap_or_default(),
            options.collect::<String>()
        )
    }

    /// Sets the compression of the whole file, if the platform wants one and neither a flag nor the name
    /// states it.
    fn set_compression(&self, registry: &Registry, request: &mut Request) -> Result<()> {
        let known = self.form.compressions;
        let dest = request.dest.as_ref().filter(|dest| !format::is_directory(dest));
        let named = dest.and_then(outer::by_name);
        if registry.get(self.form.format)?.capabilities().compression {
            return Ok(());
        }
        if let Some(stated) = request.compress.as_ref().and_then(|compress| compress.algorithm.as_deref()) {
            let stated = match stated {
                "zst" => "zstd",
                "gz" => "gzip",
                other => other,
            };
            return match known.contains(&Some(stated)) {
                true => Ok(()),
                false => Err(self.contradicts(&format!("-c={stated}"))),
            };
        }
        if request.compress.is_some() && *known == [None] {
            return Err(self.contradicts("-c").hint("the platform reads the file as it is"));
        }
        let is_named_file = dest.is_some_and(|dest| dest.path().is_some());
        let wants = known.first().copied().flatten().filter(|_| !is_named_file || !known.contains(&None));
        if let (Some(algorithm), None) = (wants, named) {
            let level = request.compress.as_ref().and_then(|compress| compress.level);
            request.compress = Some(Compress { algorithm: Some(algorithm.to_owned()), level });
        }
        Ok(())
    }

    /// Sets the options that the platform wants.
    fn set_options(&self, request: &mut Request) -> Result<()> {
        for choice in self.form.options {
            let stated = request.options.pairs.iter().rev().find(|(key, _)| key == choice.key);
            let is_taken = |value: &str| {
                let mut known = choice.others.iter().chain([&choice.value]);
                known.any(|known| known.eq_ignore_ascii_case(value))
            };
            match stated {
                None => options::set_default(&mut request.options, choice.key, choice.value),
                Some((_, value)) if is_taken(value) => {}
                Some((key, value)) => {
                    let known = [&[choice.value], choice.others].concat().join(", ");
                    return Err(self
                        .contradicts(&format!("-o {key}={value}"))
                        .hint(format!("{} takes {known}", self.platform)));
                }
            }
        }
        Ok(())
    }

    /// Gives the outputs the names and sizes that the platform takes.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for a name that it refuses;
    /// [`imgtool_core::ErrorKind::Unsupported`] for a disk that is too large.
    pub(super) fn shape(&self, args: &ConvertArgs, plan: &mut Plan, cancel: &CancelToken) -> Result<()> {
        let mut disks = Vec::new();
        for index in 0..plan.layout.outputs.len() {
            if plan.layout.outputs[index].format.driver.name() != self.form.format {
                continue;
            }
            let is_inside = self.is_inside(plan, index);
            let output = &mut plan.layout.outputs[index];
            if is_inside {
                self.rename(args, output)?;
            }
            self.check_name(output)?;
            disks.extend(output.disks.iter().map(|slot| slot.index()));
        }
        disks.into_iter().try_for_each(|disk| self.round_up(plan, disk, cancel))
    }

    /// True if the output got its name from its source.
    fn is_inside(&self, plan: &Plan, index: usize) -> bool {
        let parent = plan.layout.outputs[index].destination.path().and_then(Path::parent);
        parent.is_some() && parent == plan.layout.directory.as_deref()
    }

    /// Gives an archive in a directory the name that the platform wants.
    fn rename(&self, args: &ConvertArgs, output: &mut PlannedOutput) -> Result<()> {
        let Destination::New(path) = &mut output.destination else { return Ok(()) };
        if self.form.stem.is_some() {
            let vmid = args.devices.config.iter().find_map(|path| proxmox::vmid_of_config(path));
            let compression = output.format.outer.map(|outer| outer.compression);
            let better = proxmox::Better::of(path, compression, vmid, options::source_date_epoch()?);
            *path = better.into_path();
        }
        Ok(())
    }

    fn check_name(&self, output: &PlannedOutput) -> Result<()> {
        let Destination::New(path) = &output.destination else { return Ok(()) };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if self.form.takes_name(&name) {
            return Ok(());
        }
        let mut advice = self.form.names_in_words();
        if self.form.stem.is_some() {
            let compression = output.format.outer.map(|outer| outer.compression);
            let better = proxmox::Better::of(path, compression, None, options::source_date_epoch()?);
            advice = format!("such as {}", better.into_path().display());
        }
        Err(self.contradicts(&format!("the name '{name}'")).hint(advice))
    }

    /// Rounds the size of a disk up.
    fn round_up(&self, plan: &mut Plan, index: usize, cancel: &CancelToken) -> Result<()> {
        let device = plan.selected[index].device.clone();
        if device.open_ended || device.kind != DeviceKind::Disk {
            return Ok(());
        }
        let Some(new) = self.form.size.round_up(device.size) else {
            let (size, most) = (device.size, self.form.size.max);
            return Err(Error::unsupported(format!(
                "the disk has {size} bytes; {} takes at most {most}",
                self.platform
            ))
            .device(&*device.name)
            .hint("shrink it, or spread its content over several disks"));
        };
        if new == device.size {
            return Ok(());
        }
        new_size::change(plan, index, new, cancel)?;
        plan.layout.notes.push(Note::Text(format!(
            "{} grew from {} to {}, as {} wants it",
            plan.selected[index].name,
            exact_size(device.size),
            exact_size(new),
            self.platform
        )));
        Ok(())
    }
}

impl Inspector for Target {
    fn inspect(&self, outputs: &[FinishedOutput]) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        for output in outputs {
            let Some(image) = &output.image else {
                notes.push(format!(
                    "the output can't be read back: it was not compared with the rules of {}",
                    self.platform
                ));
                continue;
            };
            // The memory of a running guest is no disk.
            if image.info().format != self.form.format {
                continue;
            }
            let name = output.location.path().and_then(Path::file_name).map(|name| name.to_string_lossy());
            let compressions = output.compression.into_iter().collect();
            let subject = Subject::look(name.as_deref(), compressions, image)
                .map_err(|error| error.path(&output.location))?;
            let verdict = self.platform.check(&subject);
            if let Some(finding) = verdict.breaches().next() {
                return Err(Error::refused(format!(
                    "{} refuses the image: {}",
                    self.platform, finding.found
                ))
                .path(&output.location)
                .hint(finding.advice.clone()));
            }
            let found = verdict.findings.iter().filter(|finding| finding.severity == Severity::Note);
            notes.extend(found.map(|finding| line(&place(&output.location), finding)));
        }
        Ok(notes)
    }
}
