//! Sink that writes the content of a disk into an existing image.
//!
//! Bytes of a present block are overwritten where they are. A new block is first zeros at the end of the file,
//! as its content was before, so the BAT may refer to it before its data is written. Changes of the BAT go
//! through the log: after a crash, a reader replays them or finds none.

mod bat;
pub(crate) mod headers;

use std::sync::Mutex;

use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::source::SECTOR;
use imgtool_core::sync::lock;
use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Device, Error, Geometry, ImageSink, Lease, Memory, Output, OutputId, Part,
    Prepared, Result, SinkDevice, SinkPiece, WriteList,
};
use uuid::Uuid;

use crate::check;
use crate::image::{Image, UnreadableHeader};
use crate::layout::MIB;
use crate::layout::bat::{BatEntry, BatShape, PayloadState};
use bat::{BatPages, ENTRIES_PER_PAGE};
use headers::HeaderPair;

/// Length in bytes of a piece. Our choice, as for a new image.
const PIECE_LEN: u64 = 256 << 10;

/// Settings of an update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateOptions {
    /// Length in bytes of the shortest run of zeros that is not stored; `None` if all zeros are stored.
    pub(crate) zero_unit: Option<u64>,
    /// True if the disk is known to read as zeros.
    pub(crate) reads_as_zero: bool,
}

/// Sink that writes into an existing image.
pub(crate) struct Updater {
    outputs: [Output; 1],
    options: UpdateOptions,
    virtual_size: u64,
    shape: BatShape,
    /// Size in bytes of the disk that is written; `None` until the end of a stream.
    size: Mutex<Option<u64>>,
    fingerprint: Fingerprint,
    /// The image before the first write, with the changes of its log.
    old: Mutex<Option<Image>>,
    state: Mutex<State>,
    _lease: Lease,
}

/// Structures that change with each placed piece.
struct State {
    headers: HeaderPair,
    bat: BatPages,
}

impl Updater {
    /// Opens the image in `output` to write `device` into it.
    ///
    /// # Errors
    /// If the output is not an intact VHDX image without parent, or is smaller than the disk. Nothing has been
    /// written in this case.
    pub(crate) fn open(
        output: &Output,
        device: &Device,
        options: UpdateOptions,
        memory: &Memory,
    ) -> Result<Self> {
        let image = Image::open(output.reopen(memory)?, UnreadableHeader::Fail, 0, memory)?;
        let virtual_size = image.metadata.virtual_size;
        let size = (!device.open_ended).then_some(device.size);
        if image.metadata.has_parent {
            return Err(Error::unsupported("a differencing image can't be written into")
                .path(output.location())
                .hint("write into a copy that has no parent"));
        }
        if size.is_some_and(|size| size > virtual_size) {
            return Err(too_small(virtual_size, device.size).path(output.location()));
        }
        check_intact(output, memory)?;
        let lease = memory.lease(BatPages::MEMORY, "the table of a VHDX image")?;
        let headers = HeaderPair::new(output, &image);
        let end = image.reserved_regions().iter().map(|(_, region)| region.end()).max().unwrap_or(0);
        let end = end.max(image.file.len()).checked_next_multiple_of(MIB);
        let end = end.ok_or_else(|| Error::limit("the file is too large").path(output.location()))?;
        Ok(Self {
            outputs: [output.clone()],
            options,
            virtual_size,
            shape: image.shape,
            size: Mutex::new(size),
            fingerprint: Fingerprint::default(),
            state: Mutex::new(State { headers, bat: BatPages::new(output, &image, end) }),
            old: Mutex::new(Some(image)),
            _lease: lease,
        })
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }

    /// Returns the unit in bytes in which zeros are found.
    fn zero_unit(&self) -> u64 {
        self.options.zero_unit.unwrap_or(0).max(ZERO_GRANULARITY as u64)
    }

    /// Returns the file offset of a payload block that is present.
    fn present_block(&self, state: &mut State, block: u64) -> Result<Option<u64>> {
        let entry = BatEntry(state.bat.get(self.shape.payload_bat_index(block), &mut state.headers)?);
        Ok((entry.payload_state() == PayloadState::FullyPresent).then(|| entry.file_offset()))
    }

    /// Returns the file offset of a payload block. Adds a block of zeros to the file if it is not present.
    fn block(&self, state: &mut State, block: u64) -> Result<u64> {
        if let Some(file_offset) = self.present_block(state, block)? {
            return Ok(file_offset);
        }
        let file_offset = state.bat.file_len;
        let end = file_offset.checked_add(self.shape.block_size).filter(|end| i64::try_from(*end).is_ok());
        let end = end.ok_or_else(|| Error::limit("the file would be too large"))?;
        let output = self.output();
        match output.capacity() {
            // The bytes after the end of the file are zeros.
            None => output.set_len(end)?,
            Some(_) => output.write_zeros_at(file_offset, self.shape.block_size)?,
        }
        state.bat.file_len = end;
        state.bat.set(
            self.shape.payload_bat_index(block),
            BatEntry::fully_present(file_offset).0,
            &mut state.headers,
        )?;
        Ok(file_offset)
    }

    /// Places a part of a piece, block by block.
    fn place_part(&self, state: &mut State, part: &Part, writes: &mut WriteList) -> Result<()> {
        let block_size = self.shape.block_size;
        let mut position = part.guest.start;
        while position < part.guest.end {
            let block = position / block_size;
            let end = ((block + 1) * block_size).min(part.guest.end);
            match &part.bytes {
                Bytes::Data(range) => {
                    // Within the piece, which is in memory.
                    let from = range.start + (position - part.guest.start) as usize;
                    let bytes = Bytes::Data(from..from + (end - position) as usize);
                    let file_offset = self.block(state, block)?;
                    writes.push(OutputId::MAIN, file_offset + position % block_size, bytes);
                }
                _ if self.options.reads_as_zero => {}
                _ => match self.present_block(state, block)? {
                    Some(file_offset) => {
                        let file_offset = file_offset + position % block_size;
                        writes.push(OutputId::MAIN, file_offset, Bytes::Zero(end - position));
                    }
                    None if state.bat.is_empty_at(self.shape.payload_bat_index(block)) => {
                        let next = self.shape.payload_bat_index(block) / ENTRIES_PER_PAGE + 1;
                        let next = self.shape.payload_block_from(next * ENTRIES_PER_PAGE);
                        position = next.saturating_mul(block_size).max(end);
                        continue;
                    }
                    None => {}
                },
            }
            position = end;
        }
        Ok(())
    }
}

impl Consumer for Updater {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let granule = self.zero_unit();
        let piece_len = PIECE_LEN.max(granule);
        let max_zero_len = if self.options.zero_unit.is_some() { u64::MAX } else { piece_len };
        Geometry { granule, granule_required: false, piece_len, max_zero_len, ordered: true }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let piece = piece.padded_to_sector(self.virtual_size, pool);
        let nonzero = piece.nonzero_runs(ZERO_GRANULARITY);
        for run in &nonzero {
            if let Some(data) = &piece.data {
                self.fingerprint.add(piece.start + run.start as u64, &data[run.clone()]);
            }
        }
        let Some(unit) = self.options.zero_unit else {
            let piece = piece.with_zeros_as_data(pool);
            let all = 0..piece.data.as_ref().map_or(0, |data| data.len());
            return Ok(Prepared::sparse(piece, vec![all], true));
        };
        // At most 2 MiB.
        let runs = if unit as usize > ZERO_GRANULARITY { piece.nonzero_runs(unit as usize) } else { nonzero };
        Ok(Prepared::sparse(piece, runs, true))
    }

    fn resize(&self, _device: SinkDevice, size: u64) -> Result<()> {
        if size > self.virtual_size {
            return Err(too_small(self.virtual_size, size).path(self.output().location()));
        }
        *lock(&self.size) = Some(size);
        Ok(())
    }
}

impl ImageSink for Updater {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        let mut state = lock(&self.state);
        // A program that has the image open sees by these GUIDs that another one changed it.
        state.headers.change(|header| {
            header.file_write_guid = successor(header.file_write_guid, "file write");
            header.data_write_guid = successor(header.data_write_guid, "data write");
        })?;
        if let Some(image) = lock(&self.old).take().filter(|image| image.replay_stats.is_some()) {
            image.file.apply_log(self.output())?;
            self.output().sync()?;
            state.headers.change(|header| header.log_guid = Uuid::nil())?;
        }
        Ok(Vec::new())
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let mut state = lock(&self.state);
        for part in &prepared.parts {
            if part.guest.end > self.virtual_size {
                return Err(too_small(self.virtual_size, part.guest.end).path(self.output().location()));
            }
            self.place_part(&mut state, part, writes)?;
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let mut state = lock(&self.state);
        let State { headers, bat } = &mut *state;
        bat.commit(headers)?;
        let (high, low) = headers.current().data_write_guid.as_u64_pair();
        let data_write_guid = self.fingerprint.guid("data write", &[high, low]);
        headers.change(|header| header.data_write_guid = data_write_guid)?;
        // The second time, for the other copy.
        headers.change(|_| ())
    }

    fn notes(&self) -> Vec<String> {
        let size = lock(&self.size).unwrap_or(0);
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
        match self.virtual_size.saturating_sub(size) {
            0 => Vec::new(),
            kept => vec![format!(
                "the image is larger than the disk: its last {kept} bytes keep their old content"
            )],
        }
    }
}

/// Derives the GUID that follows `guid`, so that the same image and content give the same bytes.
pub(crate) fn successor(guid: Uuid, purpose: &str) -> Uuid {
    Uuid::new_v5(&guid, purpose.as_bytes())
}

/// Refuses an image with damaged headers or tables: a place that seems free could be in use.
fn check_intact(output: &Output, memory: &Memory) -> Result<()> {
    let report = check::check(output.reopen(memory)?, memory)?;
    if report.corruptions == 0 && report.check_errors == 0 {
        return Ok(());
    }
    let first = report.findings.first().map(|finding| format!(" ({finding})")).unwrap_or_default();
    Err(Error::refused(format!("the structure of the image is damaged{first}"))
        .path(output.location())
        .hint("use a backup, or make a new image"))
}

fn too_small(virtual_size: u64, size: u64) -> Error {
    Error::refused(format!(
        "the image is too small: a VHDX image of {virtual_size} bytes, the disk has {size}"
    ))
    .hint("enlarge the image first, or make a new one")
}
