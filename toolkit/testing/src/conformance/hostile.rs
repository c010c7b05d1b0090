//! Laws about damaged and malicious images.

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, CreateOptions, Disk, Driver, ImageSource, Input, Location, OpenOptions, ReadAt,
    StreamAccess,
};

use super::compare::compare;
use super::harness::make_bytes;
use super::image::Image;

/// Maximum time for opening a damaged image and reading a part of it. Our limit: generous, for busy machines;
/// it still catches loops whose count comes from the image.
const MAX_TIME: Duration = Duration::from_secs(20);

/// Maximum growth of the address space in bytes, over all damaged images of one law. Our limit: above the
/// reserves of allocators; it still catches allocations whose length comes from the image.
const MAX_MEMORY: u64 = 2 << 30;

/// Opening a truncated image, or reading all of it, fails unless the cut removed no content. A format without
/// a header may show a smaller device instead.
///
/// # Panics
/// If the driver breaks the law.
pub fn truncated_is_an_error(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    truncated_bytes_are_an_error(driver, &make_bytes(driver, options, image), image, &OpenOptions::default());
}

/// Like [`truncated_is_an_error`], for the bytes of a finished image.
pub(super) fn truncated_bytes_are_an_error(
    driver: &dyn Driver,
    whole: &[u8],
    image: &Image,
    options: &OpenOptions,
) {
    let len = whole.len();
    let mut cuts = vec![0, 1, 7, 511, 512, 513, 4096, 65_536, 65_537, len / 4, len / 3, len / 2, len / 2 + 1];
    cuts.extend([len * 3 / 4, len.saturating_sub(65_536), len.saturating_sub(4096), len.saturating_sub(513)]);
    cuts.extend([len.saturating_sub(512), len.saturating_sub(2), len.saturating_sub(1)]);
    cuts.retain(|cut| *cut < len);
    cuts.sort_unstable();
    cuts.dedup();
    for cut in cuts {
        let bytes = &whole[..cut];
        expect_noticed(driver, image, cut, random_input(bytes), options);
        if driver.capabilities().stream_read {
            expect_noticed(driver, image, cut, stream_input(bytes), options);
        }
    }
}

/// Asserts that reading a truncated image never gives wrong bytes without an error.
fn expect_noticed(driver: &dyn Driver, image: &Image, cut: usize, input: Input, options: &OpenOptions) {
    let what = if input.is_stream() { "stream" } else { "file" };
    let damage = format!("{image}, {what} cut to {cut} bytes");
    let Ok(source) = catch_panic(driver, &damage, || driver.open(input, options)) else { return };
    let smaller = source
        .info()
        .devices
        .iter()
        .zip(&image.devices)
        .any(|(found, (device, _))| found.size < device.size || found.open_ended);
    if driver.capabilities().verbatim && smaller {
        return;
    }
    let compared =
        catch_panic(driver, &damage, || compare(&source, image, driver.capabilities().size_multiple));
    if let Err(fault) = compared {
        let wrong_bytes = fault.contains("instead of") || fault.contains("is reported as zeros");
        assert!(
            !wrong_bytes,
            "{}: {image}: a {what} cut to {cut} bytes is read without an error: {fault}",
            driver.name()
        );
    }
}

/// An image to damage.
#[expect(missing_debug_implementations, reason = "a closure")]
pub struct Hostile<'a> {
    /// A small, valid image.
    pub image: &'a [u8],
    /// Byte ranges to damage: headers and tables.
    pub places: Vec<Range<usize>>,
    /// Repairs checksums after the damage, so that the driver uses the damaged numbers.
    pub repair: &'a dyn Fn(&mut [u8]),
}

impl<'a> Hostile<'a> {
    /// Selects the first `len` bytes of an image without checksums.
    pub fn head(image: &'a [u8], len: usize) -> Self {
        Self { image, places: std::iter::once(0..len.min(image.len())).collect(), repair: &|_| () }
    }

    /// Returns damaged copies of the image with descriptions. In each copy, one byte or one aligned number of
    /// four or eight bytes is replaced by a value that breaks arithmetic.
    fn damaged(&self) -> impl Iterator<Item = (String, Vec<u8>)> + '_ {
        self.places.iter().flat_map(|place| place.clone()).flat_map(move |at| {
            let old = self.image[at];
            let single = [0, 0xff, 0x7f, old ^ 0x80, old ^ 1, old.wrapping_add(1)].map(|byte| vec![byte]);
            let words = (at % 4 == 0).then(|| {
                [0u32, 1, u32::MAX, 1 << 31, i32::MAX as u32]
                    .into_iter()
                    .flat_map(|word| [word.to_le_bytes().to_vec(), word.to_be_bytes().to_vec()])
            });
            let longs = (at % 8 == 0).then(|| {
                [0u64, 1, u64::MAX, 1 << 63, i64::MAX as u64, 1 << 40, u64::MAX - 511]
                    .into_iter()
                    .flat_map(|long| [long.to_le_bytes().to_vec(), long.to_be_bytes().to_vec()])
            });
            let numbers = words.into_iter().flatten().chain(longs.into_iter().flatten());
            single.into_iter().chain(numbers).filter_map(move |bytes| {
                let mut image = self.image.to_vec();
                let target = image.get_mut(at..at + bytes.len())?;
                if *target == *bytes {
                    return None;
                }
                target.copy_from_slice(&bytes);
                (self.repair)(&mut image);
                Some((format!("byte {at} set to {bytes:02x?}"), image))
            })
        })
    }
}

/// Opening a damaged image, querying its extents and reading parts of it never panics, and takes bounded time
/// and memory.
///
/// # Panics
/// If the driver breaks the law.
pub fn hostile_bytes_do_not_panic(driver: &dyn Driver, hostile: &Hostile<'_>) {
    hostile_bytes_do_not_panic_with(driver, hostile, &OpenOptions::default());
}

/// Like [`hostile_bytes_do_not_panic`], with options for opening the image.
///
/// # Panics
/// If the driver breaks the law.
pub fn hostile_bytes_do_not_panic_with(driver: &dyn Driver, hostile: &Hostile<'_>, options: &OpenOptions) {
    let before = address_space_peak();
    for (damage, bytes) in hostile.damaged() {
        let started = Instant::now();
        for salvage in [false, true] {
            let options = OpenOptions { salvage, ..options.clone() };
            catch_panic(driver, &damage, || {
                if let Ok(source) = driver.open(random_input(&bytes), &options) {
                    read_some(&source);
                }
                if driver.capabilities().check && !salvage {
                    let _ = driver.check(random_input(&bytes), &options);
                }
                if driver.capabilities().stream_read
                    && let Ok(source) = driver.open(stream_input(&bytes), &options)
                {
                    read_some(&source);
                }
            });
        }
        let took = started.elapsed();
        assert!(took < MAX_TIME, "{}: {damage}: took {took:?}", driver.name());
        let grown = address_space_peak().saturating_sub(before);
        assert!(grown < MAX_MEMORY, "{}: {damage}: took {grown} bytes of address space", driver.name());
    }
}

/// Runs `f`; if it panics, panics with the name of the driver and the damage.
fn catch_panic<T>(driver: &dyn Driver, damage: &str, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| panic!("{}: panics on {damage}", driver.name()))
}

/// Maximum number of extent queries on a damaged image, and of extents read per query; its square bounds the
/// pieces of a stream. Our limit: enough to reach all code, few enough for devices of exbibytes.
const MAX_STEPS: usize = 64;

fn read_some(source: &Arc<dyn ImageSource>) {
    match source.access() {
        Access::Random(_) => {
            let disks = Disk::all(source).expect("an image read at random");
            disks.iter().take(8).for_each(read_random);
        }
        Access::Stream(stream) => read_stream(&mut *lock(stream)),
    }
    let _ = source.losses();
}

fn read_random(disk: &Disk) {
    let size = disk.size();
    let mut buf = vec![0; 65_536];
    let mut at = 0;
    for _ in 0..MAX_STEPS {
        if at >= size {
            break;
        }
        let Ok(extents) = disk.extents(at..size) else { break };
        for extent in extents.iter().take(MAX_STEPS) {
            let len = buf.len().min(usize::try_from(extent.len).unwrap_or(usize::MAX));
            let _ = disk.read_at(&mut buf[..len], extent.start);
            at = extent.end();
        }
    }
    for start in [0, size / 2, size.saturating_sub(513), size.saturating_sub(65_536)] {
        let len = buf.len().min(usize::try_from(size.saturating_sub(start)).unwrap_or(usize::MAX));
        let _ = disk.read_at(&mut buf[..len], start);
        let _ = disk.extents(start..size);
        let _ = disk.map(start..size);
    }
}

fn read_stream(stream: &mut dyn StreamAccess) {
    let pool = BufferPool::new();
    for _ in 0..MAX_STEPS * MAX_STEPS {
        match stream.next_piece(&pool) {
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break,
        }
    }
}

/// Returns an input over a copy of `bytes`, read by position.
pub(super) fn random_input(bytes: &[u8]) -> Input {
    Input::from_read_at("in memory", Arc::new(Memory(bytes.to_vec())))
}

/// Returns an input over a copy of `bytes`, read in order.
fn stream_input(bytes: &[u8]) -> Input {
    let reader = Box::new(io::Cursor::new(bytes.to_vec()));
    Input::from_reader(Location::Stdin, reader).expect("bytes in memory can be read")
}

/// Bytes in memory, read by position.
pub(super) struct Memory(pub(super) Vec<u8>);

impl ReadAt for Memory {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let start = usize::try_from(position).ok();
        let bytes = start.and_then(|start| self.0.get(start..start.checked_add(buf.len())?));
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

/// Returns the peak address space of this process in bytes; 0 without `/proc`.
fn address_space_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
