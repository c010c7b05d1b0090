//! A small format, correct or with one flaw, for tests of the laws.
//!
//! A header (magic, number of devices, their sizes) is followed by records in any order: device, length, unit
//! index, CRC-32 of header and data, data. An end record is the last. Units of 64 KiB without a record are
//! zero.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use imgtool_core::source::second_pass;
use imgtool_core::{
    Access, Archive, BufferPool, Bytes, Capabilities, Confidence, Consumer, CreateOptions, Device, DeviceId,
    Driver, Error, Extent, ExtentKind, ExtentList, Geometry, ImageInfo, ImageSink, ImageSource, ImageWriter,
    InPlace, Input, Manifest, OpenOptions, Output, OutputFactory, OutputId, Part, Piece, Prepared,
    RandomAccess, RandomInput, Result, SinkDevice, SinkPiece, Stream, StreamAccess, WriteList,
};

const MAGIC: &[u8; 8] = b"TOYIMG1\n";
const UNIT: u64 = 65_536;
const RECORD_LEN: usize = 24;
const MAX_DEVICES: usize = 8;
/// Maximum size of a device in bytes. Our limit: 64 TiB.
const MAX_SIZE: u64 = 1 << 46;
const END: u64 = u64::MAX;

/// A flaw of a [`Toy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// No flaw: the driver obeys every law.
    None,
    /// The last byte of every unit is lost; when read from a stream, the whole unit.
    DropsLastByte,
    /// Extents skip a byte.
    ExtentGap,
    /// Some data is reported as a hole.
    HoleOverData,
    /// Zeros are stored.
    StoresZeros,
    /// Records are in the order in which threads finish.
    OrderOfThreads,
    /// The file has no end record, so a truncation goes unnoticed.
    NoEndNeeded,
    /// Numbers from the file are used as indexes without a check.
    TrustsHeader,
    /// All reads share one position.
    SharedPosition,
    /// A read leaves the buffer unchanged where no unit is stored.
    LeavesHoles,
    /// Sizes are rounded down to units.
    RoundsDown,
    /// A failed read returns zeros, and a failed pipe counts as ended.
    SwallowsErrors,
    /// A pipe gets no end record.
    PipeWithoutEnd,
    /// The driver recognises every file.
    ClaimsAll,
}

/// The driver of the toy format, with a flaw.
#[derive(Debug)]
pub struct Toy(pub Flaw);

impl Driver for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn description(&self) -> &'static str {
        "a format for tests"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["toy"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: true,
            stream_write: true,
            archive: Some(Archive { max_devices: MAX_DEVICES as u32, attachments: false }),
            in_place: InPlace::BlockDevices,
            size_multiple: 1,
            ..Capabilities::default()
        }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        (self.0 == Flaw::ClaimsAll || head.starts_with(MAGIC)).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, _options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        if input.is_stream() {
            let mut stream = input.into_stream()?;
            let info = read_header(|buf| exactly(&mut stream, buf))?;
            let devices = info.devices.clone();
            let pass =
                ToyPass { devices, stream, flaw: self.0, gaps: None, units: HashSet::new(), finished: false };
            return Ok(Arc::new(ToyStream { info, pass: Mutex::new(pass) }));
        }
        let input = input.into_random()?;
        let mut at = 0;
        let info = read_header(|buf| {
            input.read_exact_at(buf, at)?;
            at += buf.len() as u64;
            Ok(())
        })?;
        let index = read_index(self.0, &input, at, &info)?;
        Ok(Arc::new(ToySource { info, input, index, flaw: self.0, shared: AtomicU64::new(0) }))
    }

    fn writer(&self, _options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(ToyWriter(self.0)))
    }
}

struct ToyWriter(Flaw);

impl ImageWriter for ToyWriter {
    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let mut header = MAGIC.to_vec();
        header.extend(
            u32::try_from(manifest.devices.len()).map_err(|_| Error::unsupported("devices"))?.to_le_bytes(),
        );
        for device in &manifest.devices {
            let size = if self.0 == Flaw::RoundsDown { device.size / UNIT * UNIT } else { device.size };
            header.extend(size.to_le_bytes());
        }
        Ok(Box::new(ToySink {
            next: AtomicU64::new(header.len() as u64),
            header,
            outputs: [outputs.main()?],
            flaw: self.0,
        }))
    }
}

fn exactly(stream: &mut Stream, buf: &mut [u8]) -> Result<()> {
    if stream.read_full(buf)? == buf.len() { Ok(()) } else { Err(Error::corrupt("the stream ends early")) }
}

fn read_header(mut read: impl FnMut(&mut [u8]) -> Result<()>) -> Result<ImageInfo> {
    let mut head = [0; 12];
    read(&mut head)?;
    if !head.starts_with(MAGIC) {
        return Err(Error::wrong_format("no toy"));
    }
    let count = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
    if count == 0 || count > MAX_DEVICES {
        return Err(Error::malformed(format!("{count} devices, at most {MAX_DEVICES}")));
    }
    let mut sizes = vec![0; count * 8];
    read(&mut sizes)?;
    let mut info = ImageInfo { format: "toy", cluster_size: Some(UNIT), ..ImageInfo::default() };
    for (number, bytes) in sizes.as_chunks::<8>().0.iter().enumerate() {
        let size = u64::from_le_bytes(*bytes);
        if size > MAX_SIZE {
            return Err(Error::limit(format!("{size} bytes, at most {MAX_SIZE}")));
        }
        info.devices.push(Device::disk(number as u32, format!("toy{number}"), size));
    }
    Ok(info)
}

/// Header of a record: device, length, unit index, CRC-32 of these and the data.
struct Record {
    device: u32,
    len: u32,
    unit: u64,
    crc: u32,
}

impl Record {
    fn parse(bytes: &[u8; RECORD_LEN]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let unit = u64::from(word(8)) | u64::from(word(12)) << 32;
        Self { device: word(0), len: word(4), unit, crc: word(16) }
    }

    fn to_bytes(&self) -> [u8; RECORD_LEN] {
        let mut bytes = [0; RECORD_LEN];
        bytes[..4].copy_from_slice(&self.device.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.unit.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }

    fn crc_of(&self, data: &[u8]) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&Self { crc: 0, ..*self }.to_bytes());
        crc.update(data);
        crc.finalize()
    }

    /// Validates the header and returns the guest range; `None` for the end record.
    fn check(&self, devices: &[Device], flaw: Flaw) -> Result<Option<Range<u64>>> {
        if flaw == Flaw::TrustsHeader && self.unit != END {
            let start = self.unit.wrapping_mul(UNIT);
            assert!(start < devices[self.device as usize].size);
        }
        if self.unit == END {
            return if self.crc == self.crc_of(&[]) { Ok(None) } else { Err(Error::corrupt("bad end")) };
        }
        let device = devices.get(self.device as usize).ok_or_else(|| Error::malformed("unknown device"))?;
        let start = self.unit.checked_mul(UNIT).filter(|start| *start < device.size);
        let start = start.ok_or_else(|| Error::malformed(format!("unit {} is outside", self.unit)))?;
        if u64::from(self.len) != UNIT.min(device.size - start) {
            return Err(Error::malformed(format!("a unit of {} bytes", self.len)));
        }
        Ok(Some(start..start + u64::from(self.len)))
    }
}

type Index = HashMap<(u32, u64), (u64, u32)>;

fn read_index(flaw: Flaw, input: &RandomInput, mut at: u64, info: &ImageInfo) -> Result<Index> {
    let mut index = Index::new();
    loop {
        if at >= input.len() && flaw == Flaw::NoEndNeeded {
            return Ok(index);
        }
        let mut bytes = [0; RECORD_LEN];
        if let Err(error) = input.read_exact_at(&mut bytes, at) {
            return if flaw == Flaw::NoEndNeeded { Ok(index) } else { Err(error) };
        }
        let record = Record::parse(&bytes);
        let Some(_) = record.check(&info.devices, flaw)? else { return Ok(index) };
        at += RECORD_LEN as u64;
        if at + u64::from(record.len) > input.len() && flaw == Flaw::NoEndNeeded {
            return Ok(index);
        }
        if index.insert((record.device, record.unit), (at, record.crc)).is_some() {
            return Err(Error::corrupt(format!("unit {} comes twice", record.unit)));
        }
        at += u64::from(record.len);
    }
}

struct ToySource {
    info: ImageInfo,
    input: RandomInput,
    index: Index,
    flaw: Flaw,
    shared: AtomicU64,
}

impl ImageSource for ToySource {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }
}

impl ToySource {
    fn size(&self, device: DeviceId) -> Result<u64> {
        Ok(self.info.device(device).ok_or_else(|| Error::out_of_bounds("no such device"))?.size)
    }
}

impl RandomAccess for ToySource {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut list = ExtentList::new();
        let mut at = range.start;
        while at < range.end && !list.is_full() {
            let end = ((at / UNIT + 1) * UNIT).min(range.end);
            let known = self.index.contains_key(&(device.0, at / UNIT));
            let is_hidden = self.flaw == Flaw::HoleOverData && (at / UNIT) % 7 == 3;
            list.push(at, end - at, if known && !is_hidden { ExtentKind::Data } else { ExtentKind::Hole });
            at = end;
        }
        let mut extents = list.into_vec();
        if self.flaw == Flaw::ExtentGap
            && let [.., last] = extents.as_mut_slice()
            && last.len > 1
        {
            last.start += 1;
            last.len -= 1;
        }
        Ok(extents)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let size = self.size(device)?;
        let mut at = guest_offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let within = at % UNIT;
            let len = rest.len().min((UNIT - within) as usize);
            let (part, tail) = rest.split_at_mut(len);
            match self.index.get(&(device.0, at / UNIT)) {
                Some((position, crc)) => {
                    let unit_len = UNIT.min(size - (at - within));
                    let data = match self.input.read_vec(*position, unit_len as usize) {
                        Err(_) if self.flaw == Flaw::SwallowsErrors => {
                            part.fill(0);
                            rest = tail;
                            at += len as u64;
                            continue;
                        }
                        read => read?,
                    };
                    let record = Record { device: device.0, len: unit_len as u32, unit: at / UNIT, crc: 0 };
                    if record.crc_of(&data) != *crc {
                        return Err(Error::corrupt("checksum does not match").at(*position));
                    }
                    let mut from = within;
                    if self.flaw == Flaw::SharedPosition {
                        self.shared.store(within, Ordering::SeqCst);
                        std::thread::yield_now();
                        from = self.shared.load(Ordering::SeqCst).min(data.len() as u64 - len as u64);
                    }
                    part.copy_from_slice(&data[from as usize..][..len]);
                }
                None if self.flaw == Flaw::LeavesHoles => {}
                None => part.fill(0),
            }
            rest = tail;
            at += len as u64;
        }
        Ok(())
    }
}

struct ToyStream {
    info: ImageInfo,
    pass: Mutex<ToyPass>,
}

/// The only pass over a stream.
struct ToyPass {
    devices: Vec<Device>,
    stream: Stream,
    flaw: Flaw,
    /// Pieces of zeros still to return after the end of the stream; `None` before the end.
    gaps: Option<Vec<Piece>>,
    /// Device id and index of each unit read so far.
    units: HashSet<(u32, u64)>,
    finished: bool,
}

impl ImageSource for ToyStream {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }
}

impl StreamAccess for ToyPass {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.finished {
            return Err(second_pass());
        }
        if let Some(gaps) = &mut self.gaps {
            let gap = gaps.pop();
            self.finished = gap.is_none();
            return Ok(gap);
        }
        let mut bytes = [0; RECORD_LEN];
        match exactly(&mut self.stream, &mut bytes) {
            Err(_) if self.flaw == Flaw::SwallowsErrors => return Ok(None),
            read => read?,
        }
        let record = Record::parse(&bytes);
        let Some(range) = record.check(&self.devices, self.flaw)? else {
            let mut gaps = Vec::new();
            for device in &self.devices {
                for unit in 0..device.size.div_ceil(UNIT) {
                    if !self.units.contains(&(device.id.0, unit)) {
                        let start = unit * UNIT;
                        gaps.push(Piece::zero(device.id, start, UNIT.min(device.size - start)));
                    }
                }
            }
            self.gaps = Some(gaps);
            return self.next_piece(pool);
        };
        if !self.units.insert((record.device, record.unit)) {
            return Err(Error::corrupt("a unit comes twice"));
        }
        let mut data = pool.take(record.len as usize);
        exactly(&mut self.stream, &mut data)?;
        if record.crc_of(&data) != record.crc {
            return Err(Error::corrupt("checksum does not match"));
        }
        let flawed = self.flaw == Flaw::DropsLastByte;
        Ok(Some(if flawed {
            Piece::zero(DeviceId(record.device), range.start, u64::from(record.len))
        } else {
            Piece::data(DeviceId(record.device), range.start, data)
        }))
    }
}

struct ToySink {
    header: Vec<u8>,
    outputs: [Output; 1],
    next: AtomicU64,
    flaw: Flaw,
}

impl Consumer for ToySink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: UNIT,
            granule_required: true,
            piece_len: 4 * UNIT,
            max_zero_len: if self.flaw == Flaw::StoresZeros { 4 * UNIT } else { u64::MAX },
            ordered: self.flaw != Flaw::OrderOfThreads,
        }
    }

    fn prepare(&self, mut piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        if self.flaw == Flaw::StoresZeros && piece.data.is_none() {
            let mut buffer = pool.take(piece.len as usize);
            buffer.fill(0);
            piece = SinkPiece::data(piece.device, piece.start, buffer);
        }
        if self.flaw == Flaw::OrderOfThreads {
            std::thread::sleep(std::time::Duration::from_micros(piece.start % 977));
        }
        let Some(data) = &piece.data else { return Ok(Prepared::new(piece)) };
        let mut parts = Vec::new();
        let stored = if self.flaw == Flaw::StoresZeros {
            (0..data.len())
                .step_by(UNIT as usize)
                .map(|at| at..(at + UNIT as usize).min(data.len()))
                .collect()
        } else {
            piece.nonzero_runs(UNIT as usize)
        };
        for run in stored {
            for start in run.clone().step_by(UNIT as usize) {
                let range = start..(start + UNIT as usize).min(run.end);
                let guest = piece.start + start as u64;
                let mut unit = data[range.clone()].to_vec();
                if self.flaw == Flaw::DropsLastByte {
                    *unit.last_mut().expect("a unit is not empty") = 0;
                }
                let mut record =
                    Record { device: piece.device.0, len: range.len() as u32, unit: guest / UNIT, crc: 0 };
                record.crc = record.crc_of(&unit);
                let mut bytes = record.to_bytes().to_vec();
                bytes.extend(unit);
                parts.push(Part { guest: guest..guest + range.len() as u64, bytes: Bytes::Owned(bytes) });
            }
        }
        let mut prepared = Prepared::new(piece);
        prepared.parts = parts;
        Ok(prepared)
    }
}

impl ImageSink for ToySink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        Ok(self.header.clone())
    }

    fn append_only(&self) -> bool {
        self.flaw == Flaw::NoEndNeeded
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        for part in &prepared.parts {
            let at = self.next.fetch_add(part.bytes.len(), Ordering::Relaxed);
            writes.push(OutputId::MAIN, at, part.bytes.clone());
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let omits_end = match self.flaw {
            Flaw::NoEndNeeded => true,
            Flaw::PipeWithoutEnd => self.outputs[0].is_stream(),
            _ => false,
        };
        if omits_end {
            return Ok(());
        }
        let mut end = Record { device: 0, len: 0, unit: END, crc: 0 };
        end.crc = end.crc_of(&[]);
        self.outputs[0].write_at(&end.to_bytes(), self.next.load(Ordering::Relaxed))
    }
}
