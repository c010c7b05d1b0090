//! Building blocks of the laws: write images through drivers, and compare the content read back.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::image::{Content, Image, mix};
use super::memory::MemorySource;
use crate::buffer::BufferPool;
use crate::device::{Device, DeviceId};
use crate::driver::{CreateOptions, Driver, OpenOptions};
use crate::error::{Error, Result};
use crate::pipeline::{self, Job, Route};
use crate::progress::{CancelToken, NoProgress};
use crate::sink::ImageSink;
use crate::source::{Access, ImageSource, RandomAccess, SequentialAccess};
use crate::storage::{Input, Output};
use crate::zero;

/// Bytes compared at a time: odd, so that reads begin and end at odd positions.
const COMPARE_LEN: usize = 1_000_003;

/// Threads of laws that are not about threads.
pub const THREADS: usize = 2;

/// Creates a temporary directory, removed when dropped.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("conformance-").tempdir().expect("make a temporary directory")
}

/// Creates an output file.
pub fn new_file(path: &Path) -> Output {
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("create an output");
    Output::from_new_file(path, file)
}

/// A stream output into memory, like a pipe.
#[derive(Clone, Default)]
pub struct Pipe(Arc<Mutex<Vec<u8>>>);

impl Pipe {
    /// Returns an output that writes into this pipe.
    pub fn output(&self) -> Output {
        Output::from_writer("-", Box::new(self.clone()))
    }

    /// Returns the bytes written so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Write for Pipe {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Copies all devices of `source` into the devices of the same ids of `sink`, and finishes the sink.
///
/// # Errors
/// The first error of the source, the sink or the copy.
pub fn fill_sink(source: &mut dyn ImageSource, sink: &dyn ImageSink, threads: usize) -> Result<()> {
    let routes =
        source.info().devices.iter().map(|device| Route { from: device.id, to: device.id }).collect();
    sink.begin()?;
    let job = Job { routes, threads, progress: &NoProgress, cancel: CancelToken::new() };
    pipeline::copy(source, sink, &job)?;
    sink.finish()
}

/// Creates `image` in `output` with `driver`, writes its content and flushes.
///
/// # Errors
/// The first error of the driver or the copy.
pub fn write(
    driver: &dyn Driver,
    options: &CreateOptions,
    image: &Image,
    output: &Output,
    threads: usize,
) -> Result<()> {
    let sink = driver.create(output.clone(), &image.manifest(), options)?;
    fill_sink(&mut MemorySource::new(image), &*sink, threads)?;
    output.sync()
}

/// Writes `image` into a new file in `directory` and returns its path.
///
/// # Panics
/// If the driver can't write the image.
pub fn make(driver: &dyn Driver, options: &CreateOptions, image: &Image, directory: &Path) -> PathBuf {
    make_with(driver, options, image, directory, THREADS)
}

/// Like [`make`], with a number of threads.
///
/// # Panics
/// If the driver can't write the image.
pub fn make_with(
    driver: &dyn Driver,
    options: &CreateOptions,
    image: &Image,
    directory: &Path,
    threads: usize,
) -> PathBuf {
    let number = std::fs::read_dir(directory).expect("list the directory").count();
    let path = directory.join(format!("{number}.{}", driver.name()));
    if let Err(error) = write(driver, options, image, &new_file(&path), threads) {
        panic!("{}: {image} can't be written: {error}", driver.name());
    }
    path
}

/// Returns the file that `driver` writes for `image`.
///
/// # Panics
/// If the driver can't write the image.
pub fn make_bytes(driver: &dyn Driver, options: &CreateOptions, image: &Image) -> Vec<u8> {
    let directory = scratch();
    std::fs::read(make(driver, options, image, directory.path())).expect("read the output")
}

/// Opens a file with `driver`, without undoing outer compression.
///
/// # Errors
/// The error of the driver.
pub fn open(driver: &dyn Driver, path: &Path) -> Result<Box<dyn ImageSource>> {
    open_with(driver, path, &OpenOptions::default())
}

/// Like [`open`], with options.
///
/// # Errors
/// The error of the driver.
pub fn open_with(driver: &dyn Driver, path: &Path, options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
    driver.open(Input::open_plain(path)?, options)
}

/// Asserts that `source` holds exactly `image`: devices, sizes (rounded up to a multiple of
/// `size_multiple` bytes), every byte, and valid extents.
///
/// # Panics
/// At the first difference.
pub fn assert_content(source: &mut dyn ImageSource, image: &Image, size_multiple: u64) {
    if let Err(fault) = compare(source, image, size_multiple) {
        panic!("{image}: {fault}");
    }
}

/// Reads all of `source` and compares it with `image`.
///
/// # Errors
/// A description of the first difference, or of the read error.
pub fn compare(source: &mut dyn ImageSource, image: &Image, size_multiple: u64) -> Result<(), String> {
    let devices = source.info().devices.clone();
    if devices.len() != image.devices.len() {
        return Err(format!("{} devices instead of {}", devices.len(), image.devices.len()));
    }
    for (found, (device, _)) in devices.iter().zip(&image.devices) {
        let expected = device.size.next_multiple_of(size_multiple.max(1));
        if !found.open_ended && found.size != expected {
            return Err(format!("device {} has {} bytes instead of {expected}", found.id, found.size));
        }
    }
    match source.access() {
        Access::Random(random) => {
            for (device, (_, content)) in devices.iter().zip(&image.devices) {
                compare_extents(random, device, content)?;
                compare_all(random, device, content)?;
                compare_odd_reads(random, device, content)?;
            }
            Ok(())
        }
        Access::Sequential(stream) => compare_stream(stream, &devices, image),
    }
}

/// Checks that the extents of a device are contiguous and within bounds, and report no data as zeros.
fn compare_extents(random: &dyn RandomAccess, device: &Device, content: &Content) -> Result<(), String> {
    let mut at = 0;
    let mut chunk = vec![0; 65_536];
    while at < device.size {
        let extents =
            random.extents(device.id, at..device.size).map_err(|e| format!("extents from {at}: {e}"))?;
        if extents.is_empty() {
            return Err(format!("no extent at {at}"));
        }
        for extent in extents {
            if extent.start != at || extent.len == 0 || extent.len > device.size - at {
                return Err(format!(
                    "extent {extent:?} instead of one that starts at {at} (device of {} bytes)",
                    device.size
                ));
            }
            at = extent.end();
            if extent.is_data() {
                continue;
            }
            for start in extent.range().step_by(chunk.len()) {
                let end = extent.end().min(start + chunk.len() as u64);
                if !content.is_zero(&(start..end)) {
                    let part = &mut chunk[..(end - start) as usize];
                    content.read(part, start);
                    if !zero::is_zero(part) {
                        return Err(format!(
                            "extent {extent:?} is reported as zeros, but there is data near {start}"
                        ));
                    }
                }
            }
        }
    }
    compare_bounded_extents(random, device)
}

/// Checks that extents of a range begin at its start, are contiguous, and end within it.
fn compare_bounded_extents(random: &dyn RandomAccess, device: &Device) -> Result<(), String> {
    for round in 0..64 {
        let Some((range, _)) = odd_range(device.size, round) else { break };
        let extents =
            random.extents(device.id, range.clone()).map_err(|e| format!("extents of {range:?}: {e}"))?;
        let mut at = range.start;
        for extent in &extents {
            if extent.start != at || extent.len == 0 {
                return Err(format!("extents of {range:?} are not contiguous: {extent:?} at {at}"));
            }
            at = extent.end();
        }
        if extents.is_empty() || at > range.end {
            return Err(format!("extents of {range:?} end at {at}"));
        }
    }
    Ok(())
}

/// Compares a device from start to end.
fn compare_all(random: &dyn RandomAccess, device: &Device, content: &Content) -> Result<(), String> {
    let mut found = vec![0; COMPARE_LEN];
    let mut at = 0;
    while at < device.size {
        let len = found.len().min(usize::try_from(device.size - at).unwrap_or(usize::MAX));
        compare_read(random, device.id, content, at, &mut found[..len])?;
        at += len as u64;
    }
    Ok(())
}

/// Compares reads at odd positions and lengths.
fn compare_odd_reads(random: &dyn RandomAccess, device: &Device, content: &Content) -> Result<(), String> {
    for round in 0..200 {
        let Some((range, len)) = odd_range(device.size, round) else { break };
        compare_read(random, device.id, content, range.start, &mut vec![0; len])?;
    }
    Ok(())
}

/// Returns the `round`-th of a sequence of pseudorandom ranges in a device of `size` bytes, up to 200,000
/// bytes long, with its length. `None` if the device is empty.
pub(super) fn odd_range(size: u64, round: u64) -> Option<(Range<u64>, usize)> {
    if size == 0 {
        return None;
    }
    let limits = [2, 700, 5000, 70_000, 200_000];
    let start = mix(round) % size;
    let len = (1 + mix(round ^ 0xabcd) % limits[(round % 5) as usize]).min(size - start);
    Some((start..start + len, len as usize))
}

/// Reads `found.len()` bytes at `start` and compares them.
pub(super) fn compare_read(
    random: &dyn RandomAccess,
    device: DeviceId,
    content: &Content,
    start: u64,
    found: &mut [u8],
) -> Result<(), String> {
    let len = found.len();
    // Bytes that the driver leaves unfilled must not match by chance.
    found.fill(0xee);
    random.read_at(device, found, start).map_err(|e| format!("read of {len} bytes at {start}: {e}"))?;
    compare_bytes(content, device, start, found)
}

fn compare_bytes(content: &Content, device: DeviceId, start: u64, found: &[u8]) -> Result<(), String> {
    let end = start + found.len() as u64;
    if content.is_zero(&(start..end)) && zero::is_zero(found) {
        return Ok(());
    }
    let mut expected = vec![0; found.len()];
    content.read(&mut expected, start);
    match found.iter().zip(&expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(index) => Err(format!(
            "device {device} byte {}: {:#04x} instead of {:#04x} (read of {} bytes at {start})",
            start + index as u64,
            found[index],
            expected[index],
            found.len()
        )),
    }
}

/// Reads a stream to its end, and checks that it brings every byte of every device once.
fn compare_stream(
    stream: &mut dyn SequentialAccess,
    devices: &[Device],
    image: &Image,
) -> Result<(), String> {
    let pool = BufferPool::new();
    let mut covered: Vec<Vec<Range<u64>>> = vec![Vec::new(); devices.len()];
    while let Some(piece) = stream.next_piece(&pool).map_err(|e| format!("next piece: {e}"))? {
        let Some(index) = devices.iter().position(|device| device.id == piece.device) else {
            return Err(format!("a piece of device {}, which does not exist", piece.device));
        };
        let content = &image.devices[index].1;
        match &piece.data {
            Some(data) if data.len() as u64 != piece.len => {
                return Err(format!("a piece of {} bytes with {} bytes of data", piece.len, data.len()));
            }
            Some(data) => {
                compare_bytes(content, piece.device, piece.start, data)?;
                compare_runs(data, &piece.runs)?;
            }
            None => compare_zeros(content, &piece)?,
        }
        covered[index].push(piece.start..piece.end());
    }
    for (index, device) in devices.iter().enumerate() {
        let expected = if device.open_ended { image.devices[index].0.size } else { device.size };
        if device.open_ended && stream.final_size(device.id) != Some(expected) {
            return Err(format!("final size {:?} instead of {expected}", stream.final_size(device.id)));
        }
        covered[index].sort_by_key(|range| range.start);
        let mut at = 0;
        for range in &covered[index] {
            if range.start != at {
                return Err(format!(
                    "device {}: the bytes from {at} on come twice or are missing (next piece {range:?})",
                    device.id
                ));
            }
            at = range.end;
        }
        if at != expected {
            return Err(format!("device {}: pieces end at {at} instead of {expected}", device.id));
        }
    }
    Ok(())
}

fn compare_zeros(content: &Content, piece: &crate::source::Piece) -> Result<(), String> {
    let mut chunk = vec![0; 65_536];
    for start in (piece.start..piece.end()).step_by(chunk.len()) {
        let end = piece.end().min(start + chunk.len() as u64);
        if !content.is_zero(&(start..end)) {
            let part = &mut chunk[..(end - start) as usize];
            part.fill(0);
            compare_bytes(content, piece.device, start, part)?;
        }
    }
    Ok(())
}

/// Checks that all bytes outside of the runs are zero.
fn compare_runs(data: &[u8], runs: &[Range<usize>]) -> Result<(), String> {
    let mut at = 0;
    for run in runs.iter().cloned().chain(std::iter::once(data.len()..data.len())) {
        if run.start < at || run.end < run.start || run.end > data.len() {
            return Err(format!("runs {runs:?} are not ascending within {} bytes", data.len()));
        }
        if !zero::is_zero(&data[at..run.start]) {
            return Err(format!("runs {runs:?} leave out data between {at} and {}", run.start));
        }
        at = run.end;
    }
    Ok(())
}

/// True if the driver refused the request, rather than failed.
pub(super) fn is_refusal(error: &Error) -> bool {
    use crate::error::ErrorKind::{LimitExceeded, Refused, Unsupported, Usage};
    matches!(error.kind(), Unsupported | Usage | Refused | LimitExceeded)
}
