//! Predicts the size of new images: of every disk and their sum, and, with compression, from samples.
//!
//! Nobody knows how well data compresses without compressing it. So samples of the data become a small image
//! with the settings of the real one, whose bytes are counted and discarded.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use imgtool_core::source::{data_bytes, for_each_extent};
use imgtool_core::{
    Access, CancelToken, Device, DeviceId, DeviceKind, Error, Extent, ExtentKind, ImageInfo, ImageSource,
    Location, Manifest, MapExtent, Measure, Memory, NoProgress, Output, OutputFactory, RandomAccess, ReadAt,
    Registry, Result, SinkDevice, Slot, WriteAt,
};
use imgtool_storage::outer::writer::unit_of_frames;
use imgtool_storage::{CompressedSink, Outputs};

use crate::blank::Blank;
use crate::format::TargetFormat;
use crate::layout::{Destination, Layout, PlannedOutput};
use crate::open::Opened;
use crate::run::{Plan, RunOptions};
use crate::sources::{OpenSource, SelectedDisk};

/// Length in bytes of a sample of an image that is compressed inside. Our choice: several clusters of the usual
/// formats.
const SAMPLE: u64 = 1 << 20;

/// Maximum length in bytes of all samples. Our limit: zlib compresses them in about two seconds on two cores.
const SAMPLES: u64 = 96 << 20;

/// Maximum length in bytes of the empty disk from which the compressed length of tables is estimated. Our
/// limit: it takes no time, and tables of longer disks repeat.
const BLANK: u64 = 4 << 30;

/// Predicted size of one disk.
#[derive(Debug, Clone)]
pub struct DiskMeasure {
    /// Name of the disk; untrusted.
    pub name: String,
    /// Size of its image, or of its part of an archive.
    pub size: Measure,
    /// Estimate with compression, if requested and the disk has an image of its own.
    pub estimate: Option<u64>,
}

/// Predicted sizes.
#[derive(Debug, Clone)]
pub struct Prediction {
    /// Size of every disk.
    pub disks: Vec<DiskMeasure>,
    /// Size of all images together, or of the archive.
    pub total: Measure,
    /// Estimate of the total with compression, if requested.
    pub estimate: Option<Estimate>,
}

/// Estimate of a compressed size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Estimate {
    /// Bytes of all images.
    pub bytes: u64,
    /// Bytes of data in the sources.
    pub data: u64,
    /// Bytes of this data that were compressed.
    pub sampled: u64,
}

impl Estimate {
    fn add(&mut self, other: Self) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.data = self.data.saturating_add(other.data);
        self.sampled = self.sampled.saturating_add(other.sampled);
    }
}

/// Settings of a prediction.
#[derive(Debug)]
pub struct MeasureRequest<'a> {
    /// Registry of drivers.
    pub registry: &'a Registry,
    /// Format of the new images.
    pub format: &'a TargetFormat,
    /// Image to measure.
    pub image: &'a Arc<dyn ImageSource>,
    /// Devices to convert.
    pub devices: &'a [Device],
    /// True to estimate the size with the compression of `format`.
    pub compressed: bool,
    /// Number of worker threads; 0 for one per processor.
    pub threads: usize,
    /// Token that cancels the estimate.
    pub cancel: &'a CancelToken,
    /// Ledger of the estimate.
    pub memory: &'a Memory,
}

impl MeasureRequest<'_> {
    /// Predicts the sizes.
    ///
    /// # Errors
    /// If the source can't be read; [`imgtool_core::ErrorKind::Unsupported`] if the format can't be measured.
    pub fn predict(&self) -> Result<Prediction> {
        if self.format.is_archive() { self.archive() } else { self.images() }
    }

    /// Predicts an archive. A disk counts with what it adds to an archive without disks.
    fn archive(&self) -> Result<Prediction> {
        let measure = |devices: &[Device]| self.format.writer.measure(&Part::new(self.image, devices, true));
        let header = measure(&[])?;
        let one = |device: &Device| {
            let size = measure(std::slice::from_ref(device))?;
            let size = Measure {
                required: size.required.saturating_sub(header.required),
                fully_allocated: size.fully_allocated.saturating_sub(header.fully_allocated),
                ..size
            };
            Ok(DiskMeasure { name: device.name.clone(), size, estimate: None })
        };
        let disks = self.devices.iter().map(one).collect::<Result<_>>()?;
        let estimate = self.compressed.then(|| self.estimate(self.devices)).transpose()?;
        Ok(Prediction { disks, total: measure(self.devices)?, estimate })
    }

    /// Predicts an image for each disk. The state of a guest becomes a file as it is.
    fn images(&self) -> Result<Prediction> {
        let is_whole = self.image.info().devices.len() == 1;
        let mut estimate = self.compressed.then(Estimate::default);
        let mut disks = Vec::new();
        for device in self.devices {
            let part = Part::new(self.image, std::slice::from_ref(device), false);
            let size = match device.kind {
                DeviceKind::VmState => Measure {
                    required: device.size,
                    fully_allocated: device.size,
                    occupied: device.size,
                    ..Measure::default()
                },
                // With everything that belongs to it, such as bitmaps.
                DeviceKind::Disk if is_whole => self.format.writer.measure(&**self.image)?,
                DeviceKind::Disk => self.format.writer.measure(&part)?,
            };
            let mut own = None;
            if let Some(sum) = &mut estimate {
                let found = match device.kind {
                    DeviceKind::Disk => self.estimate(std::slice::from_ref(device))?,
                    DeviceKind::VmState => {
                        Estimate { bytes: device.size, data: device.size, sampled: device.size }
                    }
                };
                own = Some(found.bytes);
                sum.add(found);
            }
            disks.push(DiskMeasure { name: device.name.clone(), size, estimate: own });
        }
        let total = match disks.as_slice() {
            [only] => only.size,
            several => several.iter().fold(Measure::default(), |sum, disk| Measure {
                required: sum.required.saturating_add(disk.size.required),
                fully_allocated: sum.fully_allocated.saturating_add(disk.size.fully_allocated),
                occupied: sum.occupied.saturating_add(disk.size.occupied),
                bitmaps: None,
            }),
        };
        Ok(Prediction { disks, total, estimate })
    }

    /// Estimates the size of one image of these devices.
    fn estimate(&self, devices: &[Device]) -> Result<Estimate> {
        let part = Part::new(self.image, devices, self.format.is_archive());
        let size = devices.iter().fold(0u64, |sum, device| sum.saturating_add(device.size));
        let data =
            part.info.devices.iter().try_fold(0u64, |sum, device| {
                Ok::<_, Error>(sum.saturating_add(data_bytes(&part, device)?))
            })?;
        let tables = self.tables(size)?;
        let Some(sample) = Sample::new(part, data, self.sample_len()?)? else {
            return Ok(Estimate { bytes: tables, data, sampled: 0 });
        };
        let (len, sampled) = (sample.len(), sample.data);
        let empty = self.len_of(Blank::new("sample", len))?;
        let gain = self.len_of(sample)?.saturating_sub(empty);
        let bytes = (gain as f64 * (data as f64 / sampled.max(1) as f64)) as u64;
        Ok(Estimate { bytes: tables.saturating_add(bytes), data, sampled })
    }

    /// Returns the length in bytes of a sample. In an output that is compressed as a whole, it is what becomes one
    /// frame: shorter samples would compress less than the output does.
    fn sample_len(&self) -> Result<u64> {
        if self.format.outer.is_none() {
            return Ok(SAMPLE);
        }
        let output = CompressedSink::inner_output(&Location::from(""));
        let devices = Blank::new("sample", BLANK).info().devices.clone();
        let manifest = Manifest { devices, ..Manifest::default() };
        let sink = self.format.writer.create(&mut Only(output), &manifest)?;
        Ok(unit_of_frames(&*sink, SinkDevice(0)).clamp(SAMPLE, SAMPLES))
    }

    /// Estimates the length of an image of `size` bytes without data.
    fn tables(&self, size: u64) -> Result<u64> {
        let short = size.min(BLANK);
        let len = self.len_of(Blank::new("sample", short))?;
        if short == size {
            return Ok(len);
        }
        let measured =
            |size| Ok::<_, Error>(self.format.writer.measure(&Blank::new("sample", size))?.required);
        let factor = measured(size)? as f64 / measured(short)?.max(1) as f64;
        Ok((len as f64 * factor) as u64)
    }

    /// Returns the length of an image of `source`, which is made and discarded.
    fn len_of(&self, source: impl ImageSource + 'static) -> Result<u64> {
        let devices = source.info().devices.clone();
        let opened = Opened::in_memory(source, self.registry.verbatim()?);
        let output = Output::from_write_at("", Box::new(Discarded));
        let planned = PlannedOutput {
            destination: Destination::Open(output.clone()),
            format: self.format.clone(),
            disks: Slot::first(devices.len()).collect(),
            attachments: Vec::new(),
            machine: None,
            bitmaps: Vec::new(),
        };
        let select = |device: Device| SelectedDisk { source: 0, name: device.name.clone(), device };
        let plan = Plan {
            layout: Layout { outputs: vec![planned], ..Layout::default() },
            sources: vec![OpenSource { name: None, opened }],
            selected: devices.into_iter().map(select).collect(),
            outputs: Outputs::new(),
            registry: self.registry.clone(),
            memory: self.memory.clone(),
        };
        let options = RunOptions {
            threads: self.threads,
            force: true,
            cancel: self.cancel.clone(),
            ..RunOptions::default()
        };
        let _ = plan.run(&options, &NoProgress)?;
        Ok(output.reached())
    }
}

/// Some devices of an image, numbered from zero.
struct Part {
    info: ImageInfo,
    image: Arc<dyn ImageSource>,
    from: Vec<DeviceId>,
}

impl Part {
    fn new(image: &Arc<dyn ImageSource>, devices: &[Device], with_attachments: bool) -> Self {
        let whole = image.info();
        let numbered = (0..).zip(devices).map(|(id, device)| Device { id: DeviceId(id), ..device.clone() });
        Self {
            info: ImageInfo {
                format: whole.format,
                devices: numbered.collect(),
                attachments: if with_attachments { whole.attachments.clone() } else { Vec::new() },
                machine: whole.machine.clone().filter(|_| with_attachments),
                ..ImageInfo::default()
            },
            image: Arc::clone(image),
            from: devices.iter().map(|device| device.id).collect(),
        }
    }

    /// Returns random access to the image, and the image's own number of a device.
    fn source(&self, device: DeviceId) -> Result<(&dyn RandomAccess, DeviceId)> {
        let random = self.image.access().random();
        let from = usize::try_from(device.0).ok().and_then(|number| self.from.get(number));
        random
            .zip(from.copied())
            .ok_or_else(|| Error::unsupported("a stream can't be measured").hint("save it to a file first"))
    }
}

impl ImageSource for Part {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }
}

impl RandomAccess for Part {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        let (random, from) = self.source(device)?;
        random.extents(from, range)
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        let (random, from) = self.source(device)?;
        random.map(from, range)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let (random, from) = self.source(device)?;
        random.read_at(from, buf, guest_offset)
    }

    fn reader_memory(&self, device: DeviceId) -> u64 {
        self.source(device).map_or(0, |(random, from)| random.reader_memory(from))
    }
}

/// Output of a sink whose image is a single file.
struct Only(Output);

impl OutputFactory for Only {
    fn main(&mut self) -> Result<Output> {
        Ok(self.0.clone())
    }

    fn beside(&mut self, _name: &str) -> Result<Output> {
        Err(Error::unsupported("an image of several files can't be compressed as a whole"))
    }
}

/// Windows of the devices of a part that hold data, one after the other as one disk.
struct Sample {
    info: ImageInfo,
    part: Part,
    /// Length in bytes of a window.
    window: u64,
    windows: Vec<(DeviceId, u64)>,
    /// Bytes of data in the windows.
    data: u64,
}

impl Sample {
    /// Chooses windows of `window` bytes evenly among `data` bytes; `None` if there is no data.
    fn new(part: Part, data: u64, window: u64) -> Result<Option<Self>> {
        let step = (data / (SAMPLES / window).max(1)).max(1);
        let mut windows: Vec<(DeviceId, u64)> = Vec::new();
        let (mut passed, mut next) = (0u64, 0u64);
        for device in &part.info.devices {
            for_each_extent(&part, device.id, 0..device.size, |extent| {
                if !extent.is_data() {
                    return Ok(());
                }
                while next < passed + extent.len {
                    let at = extent.start + (next - passed);
                    let start = at / window * window;
                    let is_new = windows.last() != Some(&(device.id, start));
                    windows.extend(is_new.then_some((device.id, start)));
                    // The rest of the window is part of the sample already.
                    let rest = start.saturating_add(window).min(extent.end()) - at;
                    next = next.saturating_add(step.max(rest));
                }
                passed += extent.len;
                Ok(())
            })?;
        }
        let mut sample = Self { info: ImageInfo::default(), part, window, windows, data: 0 };
        sample.info.format = sample.part.info.format;
        sample.info.devices = vec![Device::disk(0, "sample", sample.windows.len() as u64 * window)];
        sample.data = data_bytes(&sample, &sample.info.devices[0])?;
        Ok((sample.data > 0).then_some(sample))
    }

    fn len(&self) -> u64 {
        self.info.devices[0].size
    }

    /// Calls `see` with the parts of a range of the sample: the device, its guest range, and the distance
    /// from there to the place in the sample. What is beyond the end of a device has no device.
    fn parts(
        &self,
        range: Range<u64>,
        mut see: impl FnMut(Option<DeviceId>, Range<u64>, u64) -> Result<()>,
    ) -> Result<()> {
        let mut position = range.start;
        while position < range.end {
            let index = position / self.window;
            let found = usize::try_from(index).ok().and_then(|index| self.windows.get(index));
            let Some((device, start)) = found.copied() else {
                return Err(Error::new(imgtool_core::ErrorKind::OutOfBounds, "beyond the end of the sample"));
            };
            let end = range.end.min((index + 1) * self.window);
            let size = self.part.info.device(device).map_or(0, |device| device.size);
            let from = start + position % self.window;
            let to = from + (end - position);
            let inner = to.min(size).max(from.min(size));
            if from < inner {
                see(Some(device), from..inner, position)?;
            }
            if inner.max(from) < to {
                see(None, inner.max(from)..to, position + (inner.max(from) - from))?;
            }
            position = end;
        }
        Ok(())
    }
}

impl ImageSource for Sample {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }
}

impl RandomAccess for Sample {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut found = Vec::new();
        // One window for an answer; the caller asks on.
        let end = range.end.min((range.start / self.window + 1) * self.window);
        self.parts(range.start..end, |device, guest, place| {
            let Some(device) = device else {
                found.push(Extent { start: place, len: guest.end - guest.start, kind: ExtentKind::Hole });
                return Ok(());
            };
            for_each_extent(&self.part, device, guest.clone(), |extent| {
                found.push(Extent { start: place + (extent.start - guest.start), ..extent });
                Ok(())
            })
        })?;
        Ok(found)
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let range = guest_offset..guest_offset.saturating_add(buf.len() as u64);
        self.parts(range, |device, guest, place| {
            let at = |position: u64| usize::try_from(position - guest_offset).unwrap_or(usize::MAX);
            let part = &mut buf[at(place)..at(place + (guest.end - guest.start))];
            match device {
                Some(device) => self.part.read_at(device, part, guest.start),
                None => {
                    part.fill(0);
                    Ok(())
                }
            }
        })
    }

    fn reader_memory(&self, _device: DeviceId) -> u64 {
        let devices = self.part.info.devices.iter();
        devices.map(|device| self.part.reader_memory(device.id)).max().unwrap_or(0)
    }
}

/// A target that keeps nothing.
struct Discarded;

impl WriteAt for Discarded {
    fn write_vectored_at(&self, slices: &[IoSlice<'_>], _position: u64) -> io::Result<usize> {
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }

    fn zero_range(&self, _position: u64, _len: u64) -> io::Result<bool> {
        Ok(true)
    }

    fn read_at(&self, buf: &mut [u8], _position: u64) -> io::Result<usize> {
        buf.fill(0);
        Ok(buf.len())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn capacity(&self) -> Option<u64> {
        None
    }

    fn reads_as_zero(&self) -> bool {
        true
    }

    fn reopen(&self, _memory: &Memory) -> io::Result<Arc<dyn ReadAt>> {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}
