//! Replaying the log in memory (section 2.3.3).
//!
//! The log is a ring of 4 KiB sectors. An *entry* is valid when its header is sound, carries the
//! header's log GUID and its checksum matches. Entries that follow each other without a gap and with
//! ascending sequence numbers form a *sequence*; its last entry, the head, says in `tail` where the
//! part begins that has to be replayed, which must lie in the sequence. The *active* sequence is the
//! one whose head has the highest sequence number. It is applied to an [`Overlay`].

use std::collections::BTreeMap;
use std::ops::Range;

use imgtool_toolkit::{Error, RandomInput, Result};

use crate::file::Overlay;
use crate::layout::header::Header;
use crate::layout::log::{
    DESCRIPTOR_LEN, Descriptor, ENTRY_CHECKSUM_AT, ENTRY_HEADER_LEN, EntryHeader, LOG_SECTOR, page,
};

/// Bytes that are checksummed for each byte of data in the log before the log is given up. Ours:
/// entries that are valid do not overlap; one that a later one was written over may reach into it.
const CHECKSUMMED_PER_DATA: u64 = 2;

/// Bytes that are checksummed at most. Ours: a thousand times the log of Hyper-V and QEMU, sixteen
/// times what may be replayed.
const MOST_CHECKSUMMED: u64 = 1 << 30;

/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;

const NOT_REPLAYABLE: &str = "the image was not closed properly and its log is damaged: use a backup, or a copy made by a program that repairs it";

/// What a log changes.
#[derive(Debug)]
pub(crate) struct Replay {
    pub(crate) overlay: Overlay,
    /// The file is at least that long afterwards.
    pub(crate) least_len: u64,
    /// Entries of the active sequence that were applied.
    pub(crate) entries: usize,
}

/// Finds the active sequence of the log that `header` names, and applies it. The header has a log
/// GUID; its place was checked against the format's rules. `depth`: images above this one in a chain.
///
/// # Errors
/// When there is none or it can't be applied.
pub(crate) fn replay(input: &RandomInput, header: &Header, depth: usize) -> Result<Replay> {
    let at = |error: Error| error.path(input.path()).at(header.log_offset);
    if header.log_version != 0 {
        return Err(at(Error::unsupported(format!(
            "the log must be replayed, but is of version {}; only 0 is known",
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
        .hint(NOT_REPLAYABLE));
    }
    let ring = Ring { input, offset: header.log_offset, length: log_length };
    let entries = valid_entries(&ring, header)?;
    let active = active_sequence(&entries, log_length).ok_or_else(|| {
        at(Error::corrupt(format!(
            "the log must be replayed, but holds no valid sequence ({} valid entries)",
            entries.len()
        )))
        .hint(NOT_REPLAYABLE)
    })?;
    drop(entries);
    apply(&ring, &active, depth).map_err(at)
}

/// The log as a ring of bytes.
struct Ring<'a> {
    input: &'a RandomInput,
    /// Where it stands in the file.
    offset: u64,
    /// Bytes.
    length: u64,
}

impl Ring<'_> {
    /// Fills `buf` from `position`, going on at the start behind the end. `buf` is not longer than
    /// the ring.
    fn read(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let position = position % self.length;
        let until_end = usize::try_from(self.length - position).unwrap_or(usize::MAX);
        let (first, second) = buf.split_at_mut(until_end.min(buf.len()));
        self.input.read_exact_at(first, self.offset + position)?;
        self.input.read_exact_at(second, self.offset)
    }

    /// The next sectors from `position` that are not all hole, up to `most` bytes of them.
    fn data_from(&self, mut position: u64, most: u64) -> Result<Option<Range<u64>>> {
        while position < self.length {
            let until = position.saturating_add(most).min(self.length);
            let run = self.input.rough_run(self.offset + position, self.offset + until)?;
            let end = run.end.saturating_sub(self.offset).min(self.length);
            if run.is_data {
                let end = end.next_multiple_of(LOG_SECTOR).min(until);
                return Ok(Some(position..end));
            }
            // A hole that ends within a sector.
            let sector = end / LOG_SECTOR * LOG_SECTOR;
            if sector == position {
                return Ok(Some(position..(position + LOG_SECTOR).min(until)));
            }
            position = sector;
        }
        Ok(None)
    }

    /// Bytes of it that are no holes.
    fn data_len(&self) -> Result<u64> {
        let (mut data, mut position) = (0, 0);
        while let Some(run) = self.data_from(position, self.length)? {
            data += run.end - run.start;
            position = run.end;
        }
        Ok(data)
    }

    /// The checksum of an entry.
    fn checksum(&self, position: u64, len: u64) -> Result<u32> {
        let mut crc = 0;
        let mut done = 0;
        let mut chunk = vec![0; CHUNK.min(len) as usize];
        while done < len {
            let part = &mut chunk[..(len - done).min(CHUNK) as usize];
            self.read(part, position + done)?;
            if done == 0 {
                part[ENTRY_CHECKSUM_AT as usize..ENTRY_CHECKSUM_AT as usize + 4].fill(0);
            }
            crc = crc32c::crc32c_append(crc, part);
            done += part.len() as u64;
        }
        Ok(crc)
    }
}

/// Valid entries by their position in the log.
type Entries = BTreeMap<u64, Link>;

/// What of an entry says how it hangs together with others: a log of 4 GiB holds a million.
#[derive(Debug, Clone, Copy)]
struct Link {
    entry_length: u32,
    tail: u32,
    sequence_number: u64,
}

/// The valid entries. A hole of the file holds none: it is passed over, however long it is.
fn valid_entries(ring: &Ring<'_>, header: &Header) -> Result<Entries> {
    let mut entries = Entries::new();
    let mut budget = ring.data_len()?.saturating_mul(CHECKSUMMED_PER_DATA).min(MOST_CHECKSUMMED);
    let mut chunk = vec![0; CHUNK as usize];
    let mut position = 0;
    while let Some(data) = ring.data_from(position, CHUNK)? {
        let chunk = &mut chunk[..(data.end - data.start) as usize];
        ring.read(chunk, data.start)?;
        for (index, sector) in chunk.chunks_exact(LOG_SECTOR as usize).enumerate() {
            let Some(entry) = EntryHeader::decode(sector) else { continue };
            if entry.log_guid != header.log_guid || !is_sound(&entry, ring.length) {
                continue;
            }
            let entry_at = data.start + index as u64 * LOG_SECTOR;
            budget = budget.checked_sub(entry.entry_length.into()).ok_or_else(|| {
                Error::limit("the entries of the log overlap, or are larger than what is in it")
                    .path(ring.input.path())
                    .at(ring.offset + entry_at)
                    .hint(NOT_REPLAYABLE)
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

/// Whether the numbers of an entry's header can be true (section 2.3.1.1).
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

/// Where the entry stands that goes on with the sequence of the one at `position`.
fn following(entries: &Entries, position: u64, log_length: u64) -> Option<u64> {
    let entry = entries.get(&position)?;
    let next = (position + u64::from(entry.entry_length)) % log_length;
    let expected = entry.sequence_number.checked_add(1)?;
    entries.get(&next).filter(|next| next.sequence_number == expected).map(|_| next)
}

/// The positions of the entries to apply, in order.
fn active_sequence(entries: &Entries, log_length: u64) -> Option<Vec<u64>> {
    // Sequence numbers ascend along a sequence, so that no walk comes back to where it was.
    let mut head_of: BTreeMap<u64, u64> = BTreeMap::new();
    for &start in entries.keys() {
        let mut walked = Vec::new();
        let mut position = start;
        let head = loop {
            if let Some(&head) = head_of.get(&position) {
                break head;
            }
            walked.push(position);
            match following(entries, position, log_length) {
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
        sequence.push(following(entries, last, log_length).filter(|_| bytes < log_length)?);
    }
    Some(sequence)
}

fn apply(ring: &Ring<'_>, sequence: &[u64], depth: usize) -> Result<Replay> {
    let mut replay = Replay { overlay: Overlay::new(depth), least_len: 0, entries: sequence.len() };
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
                "a log entry makes the file {} bytes long",
                entry.last_file_offset
            )));
        }
        apply_entry(ring, *position, &entry, &mut replay.overlay)
            .map_err(|e| e.path(ring.input.path()).at(ring.offset + position).hint(NOT_REPLAYABLE))?;
        replay.least_len = entry.last_file_offset;
    }
    Ok(replay)
}

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
                let page = page(&sector, number, leading, trailing).ok_or_else(|| {
                    Error::malformed(format!(
                        "data sector of descriptor {index} of log entry {number} is not valid"
                    ))
                })?;
                overlay.page(file_offset, page)?;
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
