//! Compares an open image with its description.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Device, DeviceId, Disk, ImageSource, Piece, Result, StreamAccess, zero,
};

use super::image::{Content, Image, mix};

/// Number of bytes compared at a time: odd, so that reads begin and end at odd positions.
const COMPARE_LEN: usize = 1_000_003;

/// Asserts that `source` contains exactly `image`: devices, sizes (rounded up to a multiple of
/// `size_multiple` bytes), every byte, and valid extents.
///
/// # Panics
/// At the first difference.
pub fn assert_content(source: &Arc<dyn ImageSource>, image: &Image, size_multiple: u64) {
    if let Err(fault) = compare(source, image, size_multiple) {
        panic!("{image}: {fault}");
    }
}

/// Reads all of `source` and compares it with `image`.
///
/// # Errors
/// A description of the first difference, or of the read error.
pub fn compare(source: &Arc<dyn ImageSource>, image: &Image, size_multiple: u64) -> Result<(), String> {
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
        Access::Random(_) => {
            let disks = Disk::all(source).map_err(|e| format!("disks: {e:#}"))?;
            for (disk, (_, content)) in disks.iter().zip(&image.devices) {
                compare_extents(disk, content)?;
                compare_map(disk)?;
                compare_all(disk, content)?;
                compare_odd_reads(disk, content)?;
            }
            Ok(())
        }
        Access::Stream(stream) => compare_stream(&mut *lock(stream), &devices, image),
    }
}

/// Checks that the extents of a disk are contiguous and within bounds, and report no data as zeros.
fn compare_extents(disk: &Disk, content: &Content) -> Result<(), String> {
    let mut at = 0;
    let mut chunk = vec![0; 65_536];
    while at < disk.size() {
        let extents = disk.extents(at..disk.size()).map_err(|e| format!("extents from {at}: {e:#}"))?;
        if extents.is_empty() {
            return Err(format!("no extent at {at}"));
        }
        for extent in extents {
            if extent.start != at || extent.len == 0 || extent.len > disk.size() - at {
                return Err(format!(
                    "extent {extent:?} instead of one that starts at {at} (device of {} bytes)",
                    disk.size()
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
    compare_bounded_extents(disk)
}

/// Checks that exact and rough extents of a range begin at its start, are contiguous, and end within it.
fn compare_bounded_extents(disk: &Disk) -> Result<(), String> {
    for round in 0..64 {
        let Some((range, _)) = odd_range(disk.size(), round) else { break };
        for resolution in [None, Some(65_536)] {
            let extents = match resolution {
                None => disk.extents(range.clone()),
                Some(resolution) => disk.rough_extents(range.clone(), resolution),
            };
            let extents = extents.map_err(|e| format!("extents of {range:?}: {e:#}"))?;
            check_runs(&range, extents.iter().map(|extent| (extent.start, extent.len)), "extents")?;
        }
    }
    Ok(())
}

/// Checks that the detailed extents of a range begin at its start, are contiguous, and end within it.
fn compare_map(disk: &Disk) -> Result<(), String> {
    for round in 0..16 {
        let Some((range, _)) = odd_range(disk.size(), round) else { break };
        let extents = disk.map(range.clone()).map_err(|e| format!("map of {range:?}: {e:#}"))?;
        check_runs(&range, extents.iter().map(|extent| (extent.start, extent.len)), "map extents")?;
    }
    Ok(())
}

fn check_runs(range: &Range<u64>, runs: impl Iterator<Item = (u64, u64)>, what: &str) -> Result<(), String> {
    let mut at = range.start;
    for (start, len) in runs {
        if start != at || len == 0 {
            return Err(format!("{what} of {range:?} are not contiguous: {len} bytes from {start} at {at}"));
        }
        at = start.saturating_add(len);
    }
    if at == range.start || at > range.end {
        return Err(format!("{what} of {range:?} end at {at}"));
    }
    Ok(())
}

/// Compares a disk with `content`, from start to end.
fn compare_all(disk: &Disk, content: &Content) -> Result<(), String> {
    let mut found = vec![0; COMPARE_LEN];
    let mut at = 0;
    while at < disk.size() {
        let len = found.len().min(usize::try_from(disk.size() - at).unwrap_or(usize::MAX));
        compare_read(disk, content, at, &mut found[..len])?;
        at += len as u64;
    }
    Ok(())
}

/// Compares reads at arbitrary positions and of arbitrary lengths.
fn compare_odd_reads(disk: &Disk, content: &Content) -> Result<(), String> {
    for round in 0..200 {
        let Some((range, len)) = odd_range(disk.size(), round) else { break };
        compare_read(disk, content, range.start, &mut vec![0; len])?;
    }
    Ok(())
}

/// Returns a pseudorandom range within a device of `size` bytes, and its length of at most 200,000 bytes.
/// Equal arguments give equal ranges. `None` if the device is empty.
pub(super) fn odd_range(size: u64, round: u64) -> Option<(Range<u64>, usize)> {
    if size == 0 {
        return None;
    }
    let limits = [2, 700, 5000, 70_000, 200_000];
    let start = mix(round) % size;
    let len = (1 + mix(round ^ 0xabcd) % limits[(round % 5) as usize]).min(size - start);
    Some((start..start + len, len as usize))
}

/// Reads `found.len()` bytes at `start` and compares them with `content`.
pub(super) fn compare_read(
    disk: &Disk,
    content: &Content,
    start: u64,
    found: &mut [u8],
) -> Result<(), String> {
    let len = found.len();
    // Bytes that the driver leaves unfilled must not match by chance.
    found.fill(0xee);
    disk.read_at(found, start).map_err(|e| format!("read of {len} bytes at {start}: {e:#}"))?;
    compare_bytes(content, disk.device().id, start, found)
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

/// Reads a stream to its end, and checks that it delivers every byte of every device exactly once.
fn compare_stream(stream: &mut dyn StreamAccess, devices: &[Device], image: &Image) -> Result<(), String> {
    let pool = BufferPool::new();
    let mut covered: Vec<Vec<Range<u64>>> = vec![Vec::new(); devices.len()];
    while let Some(piece) = stream.next_piece(&pool).map_err(|e| format!("next piece: {e:#}"))? {
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
    if stream.next_piece(&pool).is_ok() {
        return Err("a second pass over a stream is no error".to_owned());
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

fn compare_zeros(content: &Content, piece: &Piece) -> Result<(), String> {
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

/// Checks that the runs are ascending, and that all bytes outside of them are zero.
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
