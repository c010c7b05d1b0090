//! The sources of a conversion: what was named, what is in it, and which devices are taken.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use imgtool_toolkit::storage::os::{self, FileId};
use imgtool_toolkit::{
    Attachment, CancelToken, Device, DeviceKind, Error, OpenOptions, Opened, Registry, Result, suggest,
};

use super::format::Format;
use super::names;
use crate::images;

/// A source on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceArg {
    /// What its device is to be called (`NAME=PATH`).
    pub name: Option<String>,
    /// Where it is; `-` for standard input.
    pub path: PathBuf,
}

impl SourceArg {
    /// Reads `PATH` or `NAME=PATH`. A file that exists under the whole name is that file.
    pub fn parse(arg: &OsStr) -> Self {
        let whole = Self { name: None, path: PathBuf::from(arg) };
        match arg.to_str().and_then(|text| text.split_once('=')) {
            Some((name, path))
                if !name.is_empty()
                    && !name.contains('/')
                    && !path.is_empty()
                    && !Path::new(arg).exists() =>
            {
                Self { name: Some(name.to_owned()), path: PathBuf::from(path) }
            }
            _ => whole,
        }
    }
}

/// A source that was opened.
pub struct Source {
    /// How it was named.
    pub arg: SourceArg,
    /// The image.
    pub opened: Opened,
    /// What the file was before it was opened.
    seen: Option<Seen>,
}

/// What tells a file that is changed: which it is, its length, when it was written to.
type Seen = (FileId, u64, Option<SystemTime>);

/// Looks at a regular file.
fn look_at(path: &Path) -> Option<Seen> {
    let meta = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    Some((os::file_identity(&meta), meta.len(), meta.modified().ok()))
}

impl Source {
    /// A source that is not watched for changes.
    pub fn new(arg: SourceArg, opened: Opened) -> Self {
        Self { arg, opened, seen: None }
    }

    /// What there is to say if its file has been written to since it was opened. That another file has
    /// its name by now does no harm: the one that was opened is read.
    pub fn change(&self) -> Option<String> {
        let (before, now) = (self.seen?, look_at(&self.arg.path)?);
        (before.0 == now.0 && before != now).then(|| {
            format!(
                "{} was written to while it was read: what was made of it may be of two states, convert again",
                images::show(&self.arg.path)
            )
        })
    }

    /// Its configurations.
    pub fn attachments(&self) -> &[Attachment] {
        &self.opened.source.info().attachments
    }
}

/// A device that goes into the conversion.
#[derive(Debug, Clone)]
pub struct Taken {
    /// Which source it is of.
    pub source: usize,
    /// What the source says about it.
    pub device: Device,
    /// What it is called from here on: names files and the archive's devices.
    pub name: String,
}

/// Opens the sources, in order.
///
/// # Errors
/// When one can't be opened; when standard input is named twice.
pub fn open(
    registry: &Registry,
    args: Vec<SourceArg>,
    format: Option<&str>,
    options: &OpenOptions,
    target: &Format,
    cancel: &CancelToken,
) -> Result<Vec<Source>> {
    if args.iter().filter(|arg| arg.path == Path::new("-")).count() > 1 {
        return Err(Error::usage("standard input can be only one of the sources"));
    }
    args.into_iter()
        .map(|arg| {
            let seen = look_at(&arg.path);
            let opened = open_one(registry, &arg.path, format, options, target, cancel)?;
            Ok(Source { arg, opened, seen })
        })
        .collect()
}

fn open_one(
    registry: &Registry,
    path: &Path,
    format: Option<&str>,
    options: &OpenOptions,
    target: &Format,
    cancel: &CancelToken,
) -> Result<Opened> {
    let mut input = images::input(registry, path, format)?.cancelled_by(cancel.clone());
    if input.is_stream() && !target.driver.capabilities().open_ended {
        let driver = match format {
            Some(name) => registry.get(name)?,
            None => registry.probe(&input.head()?, input.len())?,
        };
        // A stream that does not tell its length, into a format that must know it.
        if driver.capabilities().open_ended {
            input = input.spool()?;
        }
    }
    registry.open(input, format, options)
}

/// The devices that are taken: all, or those that `--disk` names.
///
/// # Errors
/// When a name fits no device, or a source of many devices was given one name.
pub fn take(registry: &Registry, sources: &[Source], wanted: &[String]) -> Result<Vec<Taken>> {
    let mut taken = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let info = source.opened.source.info();
        if source.arg.name.is_some() && info.devices.len() != 1 {
            return Err(Error::usage(format!(
                "NAME=PATH names one device, and this image holds {}",
                info.devices.len()
            ))
            .path(&source.arg.path));
        }
        for device in &info.devices {
            let name = device_name(registry, source, device);
            if wanted.is_empty() || wanted.iter().any(|want| *want == name || *want == device.name) {
                taken.push(Taken { source: index, device: device.clone(), name });
            }
        }
    }
    for want in wanted {
        if !taken.iter().any(|taken| taken.name == *want || taken.device.name == *want) {
            let known: Vec<String> = sources
                .iter()
                .flat_map(|source| {
                    source.opened.source.info().devices.iter().map(|d| device_name(registry, source, d))
                })
                .collect();
            return Err(Error::usage(format!("no device is called '{want}'")).hint(suggest::hint(
                want,
                "devices",
                known.iter().map(String::as_str),
            )));
        }
    }
    Ok(taken)
}

/// What a device is called: as it was named on the command line, as its archive names it, or, in a
/// format without names, after its file.
fn device_name(registry: &Registry, source: &Source, device: &Device) -> String {
    if let Some(name) = &source.arg.name {
        return name.clone();
    }
    if source.opened.driver.capabilities().max_devices > 1 {
        return device.name.clone();
    }
    names::safe(&images::stem(registry, &source.arg.path), "disk")
}

/// What readers of archives take for the state of a running guest, by its name.
const VMSTATE: &str = "vmstate";

/// Names that every reader of archives takes, each once; what had to be changed is told. A name that
/// was given on the command line stays as it is.
pub fn name_for_archive(sources: &[Source], taken: &mut [Taken]) -> Vec<String> {
    let mut notes = Vec::new();
    let mut used = HashSet::new();
    for device in taken {
        let given = sources[device.source].arg.name.is_some();
        let plain = if given { device.name.clone() } else { names::portable(&device.name) };
        let mut name = plain.clone();
        let mut number = 2u64;
        while !used.insert(name.clone()) {
            name = format!("{plain}-{number}");
            number += 1;
        }
        if name != device.name {
            notes.push(format!("device '{}' is called '{name}' in the archive", device.name));
        }
        if name == VMSTATE {
            device.device.kind = DeviceKind::VmState;
        }
        device.name = name;
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_comes_before_an_equals_sign() {
        let parse = |text: &str| SourceArg::parse(OsStr::new(text));
        assert_eq!(parse("scsi0=a/b=c.raw").name.as_deref(), Some("scsi0"));
        assert_eq!(parse("scsi0=a/b=c.raw").path, PathBuf::from("a/b=c.raw"));
        assert_eq!(parse("d/a=b.raw").name, None);
        assert_eq!(parse("=b.raw").name, None);
        assert_eq!(parse("x=-").path, PathBuf::from("-"));
        assert_eq!(parse("-").name, None);
    }
}
