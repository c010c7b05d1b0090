//! Log replay in memory (section 2.3.3).
//!
//! The log is a ring of 4 KiB sectors. An *entry* is valid if its header is sound and has the log GUID of
//! the file's header, and if its checksum matches. Valid entries that follow each other without a gap, with
//! sequence numbers ascending by one, form a *sequence*. The last entry of a sequence is its *head*. The
//! `tail` field of the head points to the first entry to replay. A sequence is valid if it contains that
//! entry. The *active* sequence is the valid sequence whose head has the highest sequence number; the driver
//! applies it to an [`Overlay`].

use std::collections::BTreeMap;
use std::ops::Range;

use imgtool_core::{Error, RandomInput, Result};

use crate::layout::header::Header;
use crate::layout::log::{
    DESCRIPTOR_LEN, Descriptor, ENTRY_CHECKSUM_AT, ENTRY_HEADER_LEN, EntryHeader, LOG_SECTOR, restore_page,
};
use crate::overlay::Overlay;

/// Maximum number of bytes to checksum per byte of data in the log. Our limit, to bound the time: valid
/// entries do not overlap, but a partly overwritten entry may reach into its successor.
const MAX_CHECKSUMMED_PER_DATA: u64 = 2;

/// Maximum number of bytes to checksum in all. Our limit, to bound the time: 1 GiB, a thousand times the
/// default log of Hyper-V and QEMU, and sixteen times the pages that an [`Overlay`] can contain.
const MAX_CHECKSUMMED: u64 = 1 << 30;

/// Maximum number of bytes to read at once.
const CHUNK_LEN: u64 = 1 << 20;

const DAMAGED_LOG_HINT: &str = "the image was not closed properly and its log is damaged: use a backup, or repair a copy with another program";

/// Result of a log replay.
#[derive(Debug)]
pub(crate) struct Replay {
    /// Changes to the file.
    pub(crate) overlay: Overlay,
    /// Minimum length of the file after replay, in bytes.
    pub(crate) min_len: u64,
    /// Number of entries applied.
    pub(crate) entries: usize,
}

/// Finds the active sequence of the log that `header` describes, and applies it to a new overlay. The header
/// must have a log GUID, and [`Header::fault`] must return `None`. `depth` is the number of images above this
/// one in a chain.
///
/// # Errors
/// `Unsupported` for an unknown version of the log; `Corrupt` or `Malformed` if the log can't be replayed;
/// `LimitExceeded` if the replay takes too much memory or time.
pub(crate) fn replay(input: &RandomInput, header: &Header, depth: usize) -> Result<Replay> {
    let at = |error: Error| error.path(input.location()).at(header.log_offset);
    if header.log_version != 0 {
        return Err(at(Error::unsupported(format!(
            "the log must be replayed, but has version {}; only version 0 is supported",
            header.log_version
        ))));
    }
    let log_length = u64::from(header.log_length);
    let end = header.log_offset.checked_add(log_length);
    if log_length == 0 || end.is_none_or(|end| end > input.len()) {
        return Err(at(Error::corrupt(format!(
            "the log must be replayed, but its {log_length} bytes do not lie within the {} bytes of the file",
            input.len()
        )))
        .hint(DAMAGED_LOG_HINT));
    }
    let ring = Ring { input, file_offset: header.log_offset, length: log_length };
    let entries = valid_entries(&ring, header)?;
    let active = active_sequence(&entries, log_length).ok_or_else(|| {
        at(Error::corrupt(format!(
            "the log must be replayed, but contains no valid sequence ({} valid entries)",
            entries.len()
        )))
        .hint(DAMAGED_LOG_HINT)
    })?;
    drop(entries);
    apply(&ring, &active, depth).map_err(at)
}

/// The log as a ring of bytes. Positions are in bytes from the start of the log.
struct Ring<'a> {
    input: &'a RandomInput,
    /// File offset of the log in bytes.
    file_offset: u64,
    /// Length of the log in bytes.
    length: u64,
}

impl Ring<'_> {
    /// Fills `buf` with the bytes from `position` on, wrapping around at the end of the ring. `buf` must not
    /// be longer than the ring.
    fn read(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let position = position % self.length;
        let until_end = usize::try_from(self.length - position).unwrap_or(usize::MAX);
        let (first, second) = buf.split_at_mut(until_end.min(buf.len()));
        self.input.read_exact_at(first, self.file_offset + position)?;
        self.input.read_exact_at(second, self.file_offset)
    }

    /// Finds the next run of sectors, from `position` on, that are not entirely in a hole of the file. The
    /// run is at most `max_len` bytes long. Returns `None` if only holes follow.
    fn next_data(&self, mut position: u64, max_len: u64) -> Result<Option<Range<u64>>> {
        while position < self.length {
            let until = position.saturating_add(max_len).min(self.length);
            let run = self.input.rough_run(self.file_offset + position, self.file_offset + until)?;
            let end = run.end.saturating_sub(self.file_offset).min(self.length);
            if run.is_data {
                let end = end.next_multiple_of(LOG_SECTOR).min(until);
                return Ok(Some(position..end));
            }
            // The sector in which the hole ends may contain data.
            let sector = end / LOG_SECTOR * LOG_SECTOR;
            if sector == position {
                return Ok(Some(position..(position + LOG_SECTOR).min(until)));
            }
            position = sector;
        }
        Ok(None)
    }

    /// Returns the total length in bytes of the sectors that are not entirely in a hole of the file.
    fn data_len(&self) -> Result<u64> {
        let (mut data, mut position) = (0, 0);
        while let Some(run) = self.next_data(position, self.length)? {
            data += run.end - run.start;
            position = run.end;
        }
        Ok(data)
    }

    /// Returns the CRC-32C of the entry of `len` bytes at `position`, computed as if its checksum field were
    /// zero.
    fn checksum(&self, position: u64, len: u64) -> Result<u32> {
        let mut crc = 0;
        let mut summed = 0;
        let mut chunk = vec![0; CHUNK_LEN.min(len) as usize];
        while summed < len {
            let part = &mut chunk[..(len - summed).min(CHUNK_LEN) as usize];
            self.read(part, position + summed)?;
            if summed == 0 {
                part[ENTRY_CHECKSUM_AT as usize..ENTRY_CHECKSUM_AT as usize + 4].fill(0);
            }
            crc = crc32c::crc32c_append(crc, part);
            summed += part.len() as u64;
        }
        Ok(crc)
    }
}

/// Valid entries by their position in the log.
type Entries = BTreeMap<u64, Link>;

/// The fields that link an entry to its neighbours. The struct is small, because a log may have many entries:
/// [`MAX_CHECKSUMMED`] permits 262,144 entries of 4 KiB.
#[derive(Debug, Clone, Copy)]
struct Link {
    /// Length of the entry in bytes.
    entry_length: u32,
    /// Position of the first entry to replay, if this entry is the head.
    tail: u32,
    sequence_number: u64,
}

/// Finds the valid entries. Skips holes of the file, which contain no entries.
fn valid_entries(ring: &Ring<'_>, header: &Header) -> Result<Entries> {
    let mut entries = Entries::new();
    let mut budget = ring.data_len()?.saturating_mul(MAX_CHECKSUMMED_PER_DATA).min(MAX_CHECKSUMMED);
    let mut chunk = vec![0; CHUNK_LEN as usize];
    let mut position = 0;
    while let Some(data) = ring.next_data(position, CHUNK_LEN)? {
        let chunk = &mut chunk[..(data.end - data.start) as usize];
        ring.read(chunk, data.start)?;
        for (index, sector) in chunk.chunks_exact(LOG_SECTOR as usize).enumerate() {
            let Some(entry) = EntryHeader::decode(sector) else { continue };
            if entry.log_guid != header.log_guid || !is_sound(&entry, ring.length) {
                continue;
            }
            let entry_at = data.start + index as u64 * LOG_SECTOR;
            budget = budget.checked_sub(entry.entry_length.into()).ok_or_else(|| {
                Error::limit("the entries of the log overlap, or claim more bytes than the log holds")
                    .path(ring.input.location())
                    .at(ring.file_offset + entry_at)
                    .hint(DAMAGED_LOG_HINT)
            })?;
            if ring.checksum(entry_at, entry.entry_length.into())? == entry.checksum {
                let EntryHeader { entry_length, tail, sequence_number, .. } = entry;
                entries.insert(entry_at, Link { entry_length, tail, sequence_number });
            }
        }
        position = data.end;
    }
    Ok(entries)
}

/// True if the numbers in an entry's header follow the rules of section 2.3.1.1.
fn is_sound(entry: &EntryHeader, log_length: u64) -> bool {
    let length = u64::from(entry.entry_length);
    let tail = u64::from(entry.tail);
    (LOG_SECTOR..=log_length).contains(&length)
        && length.is_multiple_of(LOG_SECTOR)
        && tail < log_length
        && tail.is_multiple_of(LOG_SECTOR)
        && entry.sequence_number > 0
        && entry.descriptor_sectors() * LOG_SECTOR <= length
}

/// Returns the position of the entry that follows the entry at `position` in its sequence; `None` if the
/// latter is the head.
fn successor(entries: &Entries, position: u64, log_length: u64) -> Option<u64> {
    let entry = entries.get(&position)?;
    let next = (position + u64::from(entry.entry_length)) % log_length;
    let expected = entry.sequence_number.checked_add(1)?;
    entries.get(&next).filter(|next| next.sequence_number == expected).map(|_| next)
}

/// Returns the positions of the entries to replay, in order; `None` if there is no valid sequence.
fn active_sequence(entries: &Entries, log_length: u64) -> Option<Vec<u64>> {
    // Maps each entry to the head of its sequence. Sequence numbers ascend, so no walk visits an entry twice.
    let mut head_of: BTreeMap<u64, u64> = BTreeMap::new();
    for &start in entries.keys() {
        let mut walked = Vec::new();
        let mut position = start;
        let head = loop {
            if let Some(&head) = head_of.get(&position) {
                break head;
            }
            walked.push(position);
            match successor(entries, position, log_length) {
                Some(next) => position = next,
                None => break position,
            }
        };
        head_of.extend(walked.into_iter().map(|position| (position, head)));
    }
    let tail_of = |head: u64| entries.get(&head).map(|entry| u64::from(entry.tail));
    let is_valid = |head: &u64| tail_of(*head).is_some_and(|tail| head_of.get(&tail) == Some(head));
    let head = head_of
        .values()
        .copied()
        .filter(is_valid)
        .max_by_key(|head| entries.get(head).map(|entry| entry.sequence_number))?;
    let mut sequence = vec![tail_of(head)?];
    let mut bytes = 0;
    while let Some(&last) = sequence.last()
        && last != head
    {
        bytes += u64::from(entries.get(&last)?.entry_length);
        sequence.push(successor(entries, last, log_length).filter(|_| bytes < log_length)?);
    }
    Some(sequence)
}

/// Applies the entries at the positions in `sequence` to a new overlay.
fn apply(ring: &Ring<'_>, sequence: &[u64], depth: usize) -> Result<Replay> {
    let mut replay = Replay { overlay: Overlay::new(depth), min_len: 0, entries: sequence.len() };
    for position in sequence {
        let mut header = [0; ENTRY_HEADER_LEN as usize];
        ring.read(&mut header, *position)?;
        let entry = EntryHeader::decode(&header)
            .ok_or_else(|| Error::corrupt("a log entry changed while it was read"))?;
        if entry.flushed_file_offset > ring.input.len() {
            return Err(Error::corrupt(format!(
                "the file has {} bytes, but had {} when its log was written",
                ring.input.len(),
                entry.flushed_file_offset
            ))
            .hint("the file is cut short: copy it again, or use a backup"));
        }
        if i64::try_from(entry.last_file_offset).is_err() {
            return Err(Error::malformed(format!(
                "a log entry makes the file {} bytes long; the limit is {}",
                entry.last_file_offset,
                i64::MAX
            )));
        }
        apply_entry(ring, *position, &entry, &mut replay.overlay).map_err(|e| {
            e.path(ring.input.location()).at(ring.file_offset + position).hint(DAMAGED_LOG_HINT)
        })?;
        replay.min_len = entry.last_file_offset;
    }
    Ok(replay)
}

/// Applies the descriptors of the entry at `position` to `overlay`.
fn apply_entry(ring: &Ring<'_>, position: u64, entry: &EntryHeader, overlay: &mut Overlay) -> Result<()> {
    let number = entry.sequence_number;
    let mut data_sector = entry.descriptor_sectors() * LOG_SECTOR;
    let (mut descriptors, mut sector) = (vec![0; LOG_SECTOR as usize], vec![0; LOG_SECTOR as usize]);
    ring.read(&mut descriptors, position)?;
    for index in 0..u64::from(entry.descriptor_count) {
        let start = ENTRY_HEADER_LEN + index * DESCRIPTOR_LEN;
        if start.is_multiple_of(LOG_SECTOR) {
            ring.read(&mut descriptors, position + start)?;
        }
        let in_sector = (start % LOG_SECTOR) as usize;
        let bytes = &descriptors[in_sector..in_sector + DESCRIPTOR_LEN as usize];
        match Descriptor::decode(bytes, number) {
            Some(Descriptor::Zero { file_offset, len }) => {
                overlay.zero(Range { start: file_offset, end: file_offset + len })?;
            }
            Some(Descriptor::Data { file_offset, leading, trailing }) => {
                if data_sector >= u64::from(entry.entry_length) {
                    return Err(Error::malformed(format!(
                        "log entry {number} is too short for its {} descriptors",
                        entry.descriptor_count
                    )));
                }
                ring.read(&mut sector, position + data_sector)?;
                data_sector += LOG_SECTOR;
                let page = restore_page(&sector, number, leading, trailing).ok_or_else(|| {
                    Error::malformed(format!(
                        "the data sector of descriptor {index} of log entry {number} is not valid"
                    ))
                })?;
                overlay.overwrite(file_offset, page)?;
            }
            None => {
                return Err(Error::malformed(format!(
                    "descriptor {index} of log entry {number} is not valid"
                )));
            }
        }
    }
    Ok(())
}
