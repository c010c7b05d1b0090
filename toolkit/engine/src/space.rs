//! The space check: refuses outputs that can't fit, before the first byte is written.
//!
//! The check must not refuse outputs that would fit. It skips outputs of unknown size, and file systems that
//! are remote or share blocks with the source. Where the file system may compress, outputs that do not fit as
//! they are get a note instead. Data may turn out to be zero and take no space, so the check makes estimates,
//! from the cheapest to the most expensive, and accepts the outputs at the first one that fits:
//!
//! 1. the outputs with every part allocated;
//! 2. the space that verbatim source files occupy;
//! 3. the extents of data that the sources report;
//! 4. the nonzero data in these extents, estimated from samples.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use imgtool_core::source::{for_each_extent, uniform_extent};
use imgtool_core::zero;
use imgtool_core::{
    Access, DeviceId, Error, Extent, ExtentKind, ImageInfo, ImageSource, Location, Measure, RandomAccess,
    Result,
};
use imgtool_storage::os::{self, Space};

use crate::layout::{Destination, Layout, PlannedOutput};
use crate::monitor::Monitor;
use crate::sources::{OpenSource, SelectedDisk};

/// Length in bytes of a sample: the smallest run that an output stores.
const SAMPLE: u64 = 4096;

/// Maximum number of samples for an output. Our limit: a hard disk reads them in a few seconds. If there is
/// less data, all of it is read.
const SAMPLES: u64 = 2048;

/// Margin of error of a share estimated from [`SAMPLES`] samples: five standard deviations of 0.5 / √2048 =
/// 1.1 % each.
const MARGIN: f64 = 0.055;

/// Refuses outputs for which there is not enough space, or warns the user where the file system may compress.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`], with the needed and free bytes; any error from reading a source.
pub(crate) fn check(
    layout: &Layout,
    sources: &[OpenSource],
    selected: &[SelectedDisk],
    monitor: &dyn Monitor,
) -> Result<()> {
    // Group the outputs by file system, whose space they share.
    let mut groups: BTreeMap<u64, (&Path, Vec<&PlannedOutput>)> = BTreeMap::new();
    for output in layout.outputs.iter().filter(|output| is_measured(output, selected)) {
        let Some(directory) = output.destination.path().and_then(existing_directory) else { continue };
        let Some(file_system) = os::file_system(directory) else { continue };
        groups.entry(file_system).or_insert((directory, Vec::new())).1.push(output);
    }
    for (directory, outputs) in groups.into_values() {
        let shares = sources.iter().any(|source| {
            source.opened.location.path().is_some_and(|path| os::may_share_blocks(path, directory))
        });
        let Ok(space) = os::space(directory) else { continue };
        if shares || !(space.is_exact || space.may_compress) {
            continue;
        }
        if let Some(needed) = lacking(&outputs, sources, selected, space.free)? {
            judge(outputs[0].destination.location(), outputs.len(), space, needed, monitor)?;
        }
    }
    Ok(())
}

/// Refuses `count` outputs, `first` among them, that need more bytes than are free, or warns the user where
/// the file system may compress.
fn judge(first: Location, count: usize, space: Space, needed: u64, monitor: &dyn Monitor) -> Result<()> {
    let what = match count {
        1 => "the output needs at least".to_owned(),
        _ => format!("the {count} outputs need at least"),
    };
    let free = space.free;
    let numbers = format!("{what} {needed} bytes, and {free} are free");
    if space.may_compress {
        monitor.warn(&format!("{numbers}: there is enough space only if the file system compresses them"));
        return Ok(());
    }
    Err(Error::refused(format!("not enough space: {numbers}")).path(first).remedied_by(
        imgtool_core::Remedy::ForceWrite("free some space, choose another directory, or compress".into()),
    ))
}

/// True if the size of an output follows from its source: it is a new file without compression or backing
/// image, and the sizes of its disks are known.
fn is_measured(output: &PlannedOutput, selected: &[SelectedDisk]) -> bool {
    matches!(output.destination, Destination::New(_))
        && output.format.is_measurable()
        && output.disks.iter().all(|slot| !selected[slot.index()].device.open_ended)
}

/// Returns the directory of a new file, or the nearest ancestor that exists; a file at a mount point itself, since
/// it has another file system.
fn existing_directory(path: &Path) -> Option<&Path> {
    if os::is_mount_point(path) {
        return Some(path);
    }
    let directory = path.ancestors().skip(1).find(|above| above.as_os_str().is_empty() || above.is_dir())?;
    Some(if directory.as_os_str().is_empty() { Path::new(".") } else { directory })
}

/// Returns the number of bytes that the outputs need, if more than `free`.
fn lacking(
    outputs: &[&PlannedOutput],
    sources: &[OpenSource],
    selected: &[SelectedDisk],
    free: u64,
) -> Result<Option<u64>> {
    let (mut empty, mut full) = (0u64, 0u64);
    for output in outputs {
        // If the format can't be measured, there is no reason to refuse.
        let blank = OutputContent::new(output, sources, selected, false);
        let Ok(blank) = output.format.writer.measure(&blank) else { return Ok(None) };
        empty = empty.saturating_add(blank.occupied);
        full = full.saturating_add(blank.fully_allocated);
    }
    if empty > free {
        return Ok(Some(empty));
    }
    if full <= free
        || stored_bytes(outputs, sources, selected).is_some_and(|len| empty.saturating_add(len) <= free)
    {
        return Ok(None);
    }
    let mut estimate = 0u64;
    let mut contents = Vec::new();
    for output in outputs {
        let content = OutputContent::new(output, sources, selected, true);
        let Ok(Measure { occupied, .. }) = output.format.writer.measure(&content) else { return Ok(None) };
        estimate = estimate.saturating_add(occupied);
        contents.push(content);
    }
    if estimate <= free {
        return Ok(None);
    }
    let mut certain = 0u64;
    for content in contents {
        certain = certain.saturating_add(content.certain_bytes()?);
    }
    Ok((certain > free).then_some(estimate))
}

/// Returns the number of bytes that the source files occupy, if all of them are verbatim: an upper bound of
/// their data, without a walk over the extents; a scattered disk has half a million. A source file system that
/// compresses makes the check more lenient.
fn stored_bytes(
    outputs: &[&PlannedOutput],
    sources: &[OpenSource],
    selected: &[SelectedDisk],
) -> Option<u64> {
    let slots = outputs.iter().flat_map(|output| &output.disks);
    slots.map(|slot| &sources[selected[slot.index()].source].opened).try_fold(0u64, |sum, opened| {
        // The other parts of a joined disk are not counted here.
        let opened = Some(opened).filter(|opened| opened.parts.is_empty())?;
        let meta = std::fs::metadata(opened.location.path()?).ok().filter(std::fs::Metadata::is_file)?;
        let is_plain = opened.driver.capabilities().verbatim && opened.compression.is_empty();
        is_plain.then(|| sum.saturating_add(os::allocated_len(&meta)))
    })
}

/// The disks of one output as one source, for measuring. Streams count as holes. Without content, so does
/// every disk.
struct OutputContent<'a> {
    info: ImageInfo,
    devices: Vec<(Option<&'a dyn RandomAccess>, DeviceId)>,
}

impl<'a> OutputContent<'a> {
    fn new(
        output: &PlannedOutput,
        sources: &'a [OpenSource],
        selected: &[SelectedDisk],
        with_content: bool,
    ) -> Self {
        let mut content = Self { info: ImageInfo::default(), devices: Vec::new() };
        for (number, slot) in (0..).zip(&output.disks) {
            let from = &selected[slot.index()];
            let mut device = from.device.clone();
            device.id = DeviceId(number);
            content.info.devices.push(device);
            let random = sources[from.source].opened.image.access().random().filter(|_| with_content);
            content.devices.push((random, from.device.id));
        }
        content
    }

    /// Returns a lower bound of the length in bytes of nonzero data, estimated from samples.
    fn certain_bytes(&self) -> Result<u64> {
        let mut data = 0u64;
        self.each_data(|_, extent| {
            data += extent.len;
            Ok(())
        })?;
        let step = (data / SAMPLES).next_multiple_of(SAMPLE).max(SAMPLE);
        let (mut sampled, mut not_zero) = (0u64, 0u64);
        let (mut passed, mut next) = (0u64, 0u64);
        let mut bytes = vec![0; usize::try_from(SAMPLE).unwrap_or_default()];
        self.each_data(|device, extent| {
            while next < passed + extent.len {
                let start = extent.start + (next - passed);
                let len = SAMPLE.min(extent.end() - start);
                let buf = &mut bytes[..usize::try_from(len).unwrap_or_default()];
                self.read_at(device, buf, start)?;
                sampled += len;
                not_zero += if zero::is_zero(buf) { 0 } else { len };
                next += step;
            }
            passed += extent.len;
            Ok(())
        })?;
        if sampled == data {
            return Ok(not_zero);
        }
        let share = not_zero as f64 / sampled.max(1) as f64 - MARGIN;
        Ok((data as f64 * share.max(0.0)) as u64)
    }

    /// Calls `see` with each extent of data.
    fn each_data(&self, mut see: impl FnMut(DeviceId, Extent) -> Result<()>) -> Result<()> {
        for device in &self.info.devices {
            for_each_extent(self, device.id, 0..device.size, |extent| {
                if extent.is_data() { see(device.id, extent) } else { Ok(()) }
            })?;
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

impl ImageSource for OutputContent<'_> {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }
}

impl RandomAccess for OutputContent<'_> {
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use imgtool_core::sync::lock;

    use super::*;

    #[derive(Default)]
    struct Warnings(Mutex<Vec<String>>);

    impl Monitor for Warnings {
        fn warn(&self, note: &str) {
            lock(&self.0).push(note.to_owned());
        }
    }

    #[test]
    fn warns_instead_of_refusing_where_the_file_system_may_compress() {
        let space = |may_compress: bool| Space { free: 100, is_exact: !may_compress, may_compress };
        let warnings = Warnings::default();
        let judged = |may_compress: bool| judge(Location::from("a"), 1, space(may_compress), 200, &warnings);
        let refused = judged(false).expect_err("too large");
        let numbers = "the output needs at least 200 bytes, and 100 are free";
        assert_eq!(refused.message(), format!("not enough space: {numbers}"));
        assert!(lock(&warnings.0).is_empty());
        judged(true).expect("a note");
        let note = format!("{numbers}: there is enough space only if the file system compresses them");
        assert_eq!(*lock(&warnings.0), [note]);
    }
}
