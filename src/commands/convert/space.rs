//! Whether there is room for the outputs: asked before the first byte is written.
//!
//! A refusal must be right: what is data in the source may turn out to be zero and take no room, some
//! file systems compress or share, and a compressed output is of no known size. So the question is
//! asked in steps, and each step costs only those who did not pass the one before: would it fit with
//! everything allocated? does it fit as the source's tables have it? and does it fit without the
//! zeros, of which samples are taken? Only then is it refused.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use imgtool_toolkit::source::uniform_extent;
use imgtool_toolkit::storage::os;
use imgtool_toolkit::zero;
use imgtool_toolkit::{
    Access, DeviceId, Error, Extent, ExtentKind, ImageInfo, ImageSource, RandomAccess, Result,
};

use super::layout::{Layout, Place, Target};
use super::sources::{Source, Taken};

/// Bytes that are looked at as one: zero, or not. The smallest that an output stores.
const SAMPLE: u64 = 4096;

/// Samples taken of a target. Ours: as many as a disk with moving heads reads in a few seconds. What
/// has fewer such units is read as a whole.
const SAMPLES: u64 = 2048;

/// By how much the share of zeros may be off when only samples are known: five standard deviations
/// of 2048 samples (0.5 / √2048 = 1.1 % each).
const DOUBT: f64 = 0.055;

/// Refuses outputs for which there is no room.
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Refused`], with both numbers.
pub fn check(layout: &Layout, sources: &[Source], taken: &[Taken]) -> Result<()> {
    // Targets by file system: they share its room.
    let mut groups: BTreeMap<u64, (&Path, Vec<&Target>)> = BTreeMap::new();
    for target in layout.targets.iter().filter(|target| is_measured(target, taken)) {
        let Some(directory) = existing_directory(target.place.path()) else { continue };
        let Some(file_system) = file_system(directory) else { continue };
        groups.entry(file_system).or_insert((directory, Vec::new())).1.push(target);
    }
    for (directory, targets) in groups.into_values() {
        let shares = sources.iter().any(|source| os::may_share_blocks(&source.arg.path, directory));
        match os::space(directory) {
            Ok(space) if space.is_exact && !shares => check_room(&targets, sources, taken, space.free)?,
            _ => {}
        }
    }
    Ok(())
}

/// Whether what is written to a target is known from its source: new files, not compressed, not on
/// top of another image.
fn is_measured(target: &Target, taken: &[Taken]) -> bool {
    let format = &target.format;
    matches!(target.place, Place::New(_))
        && format.outer.is_none()
        && format.options.compress.is_none()
        && format.options.get("backing_file").is_none()
        && target.devices.iter().all(|device| !taken[*device].device.open_ended)
}

/// The directory that a new file will be in, or the one above that exists already.
fn existing_directory(path: &Path) -> Option<&Path> {
    let directory = path.ancestors().skip(1).find(|above| above.as_os_str().is_empty() || above.is_dir())?;
    Some(if directory.as_os_str().is_empty() { Path::new(".") } else { directory })
}

#[cfg(unix)]
fn file_system(directory: &Path) -> Option<u64> {
    std::fs::metadata(directory).ok().map(|meta| std::os::unix::fs::MetadataExt::dev(&meta))
}

#[cfg(not(unix))]
fn file_system(_directory: &Path) -> Option<u64> {
    None
}

fn check_room(targets: &[&Target], sources: &[Source], taken: &[Taken], free: u64) -> Result<()> {
    let (mut empty, mut full) = (0u64, 0u64);
    for target in targets {
        // A format that does not measure says nothing.
        let Ok(blank) = Chosen::new(target, sources, taken, false).measure(target) else { return Ok(()) };
        empty = empty.saturating_add(blank.occupied);
        full = full.saturating_add(blank.fully_allocated);
    }
    if empty > free {
        return Err(no_room(targets, empty, free));
    }
    if full <= free {
        return Ok(());
    }
    let (mut estimate, mut certain) = (0u64, 0u64);
    for target in targets {
        let chosen = Chosen::new(target, sources, taken, true);
        let Ok(measured) = chosen.measure(target) else { return Ok(()) };
        estimate = estimate.saturating_add(measured.occupied);
        certain = certain.saturating_add(chosen.certain_bytes()?);
        if estimate > free && certain > free {
            return Err(no_room(targets, estimate, free));
        }
    }
    Ok(())
}

fn no_room(targets: &[&Target], needed: u64, free: u64) -> Error {
    let what = if targets.len() == 1 {
        "the output needs at least".to_owned()
    } else {
        format!("the {} outputs need at least", targets.len())
    };
    Error::refused(format!("there is no room: {what} {needed} bytes, and {free} are free"))
        .path(targets[0].place.path())
        .hint("nothing was written; free some space, choose another directory, or compress; --force tries all the same")
}

/// The devices of one target, as one source that can be measured. What can't be read at random, and
/// all of it if the content does not count, is taken for a hole.
struct Chosen<'a> {
    info: ImageInfo,
    devices: Vec<(Option<&'a dyn RandomAccess>, DeviceId)>,
}

impl<'a> Chosen<'a> {
    fn new(target: &Target, sources: &'a [Source], taken: &[Taken], with_content: bool) -> Self {
        let mut chosen =
            Self { info: ImageInfo { format: "raw", ..ImageInfo::default() }, devices: Vec::new() };
        for (number, index) in (0..).zip(&target.devices) {
            let from = &taken[*index];
            let mut device = from.device.clone();
            device.id = DeviceId(number);
            chosen.info.devices.push(device);
            let random = sources[from.source].opened.source.random().filter(|_| with_content);
            chosen.devices.push((random, from.device.id));
        }
        chosen
    }

    fn measure(&self, target: &Target) -> Result<imgtool_toolkit::Measure> {
        target.format.driver.measure(self, &target.format.options)
    }

    /// A number of bytes that are surely not zero: of the data, what samples of it show.
    fn certain_bytes(&self) -> Result<u64> {
        let mut data = 0u64;
        self.each_data(|_, extent| {
            data += extent.len;
            Ok(())
        })?;
        let step = (data / SAMPLES).next_multiple_of(SAMPLE).max(SAMPLE);
        let (mut looked_at, mut not_zero) = (0u64, 0u64);
        let (mut passed, mut next) = (0u64, 0u64);
        let mut bytes = vec![0; usize::try_from(SAMPLE).unwrap_or_default()];
        self.each_data(|device, extent| {
            while next < passed + extent.len {
                let start = extent.start + (next - passed);
                let len = SAMPLE.min(extent.end() - start);
                let buf = &mut bytes[..usize::try_from(len).unwrap_or_default()];
                self.read_at(device, buf, start)?;
                looked_at += len;
                not_zero += if zero::is_zero(buf) { 0 } else { len };
                next += step;
            }
            passed += extent.len;
            Ok(())
        })?;
        if looked_at == data {
            return Ok(not_zero);
        }
        let share = not_zero as f64 / looked_at.max(1) as f64 - DOUBT;
        Ok((data as f64 * share.max(0.0)) as u64)
    }

    /// Calls `see` for each extent of data.
    fn each_data(&self, mut see: impl FnMut(DeviceId, Extent) -> Result<()>) -> Result<()> {
        for device in &self.info.devices {
            let mut position = 0;
            while position < device.size {
                for extent in self.extents(device.id, position..device.size)? {
                    position = extent.end();
                    if extent.is_data() {
                        see(device.id, extent)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn source(&self, device: DeviceId) -> (Option<&'a dyn RandomAccess>, DeviceId) {
        usize::try_from(device.0)
            .ok()
            .and_then(|number| self.devices.get(number))
            .copied()
            .unwrap_or((None, device))
    }
}

impl ImageSource for Chosen<'_> {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&mut self) -> Access<'_> {
        Access::Random(self)
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        Some(self)
    }
}

impl RandomAccess for Chosen<'_> {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        match self.source(device) {
            (Some(random), from) => random.extents(from, range),
            (None, _) => Ok(uniform_extent(range, ExtentKind::Hole)),
        }
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        match self.source(device) {
            (Some(random), from) => random.read_at(from, buf, guest_offset),
            (None, _) => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}
