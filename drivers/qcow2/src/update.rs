//! Sink that writes the content of a disk into an existing image.
//!
//! The image keeps its virtual size, options, snapshots and backing file. A cluster with a single reference is
//! overwritten; every other one is replaced by a new cluster, and a changed L2 table by a copy. Until
//! [`Updater::finish`], nothing in the image refers to a new cluster. It then orders its writes so that the
//! image is intact after each of them, and at worst has leaked clusters:
//!
//! 1. the refcounts of the new clusters, the copies of L2 tables, and the data;
//! 2. the refcount table;
//! 3. the L1 entries, which switch from the old tables to the copies;
//! 4. the refcounts of what the old tables alone referred to.

mod bitmaps;
mod compress;
pub mod refcounts;
pub mod tables;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::source::SECTOR;
use imgtool_core::sync::lock;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Device, Disk, Error, ExternalOpener, Externals, Geometry, ImageSink,
    ImageSource, Input, Location, Memory, NamedFiles, OpenOptions, Output, OutputId, Prepared, Remedy,
    Result, SinkDevice, SinkPiece, WriteList,
};

use crate::check;
use crate::compressed::Encoder;
use crate::layout::FORMAT;
use crate::layout::entry::{L2Entry, Shape, Subclusters};
use crate::layout::header::{
    AUTOCLEAR_DATA_FILE_RAW, CompressionType, Encryption, Header, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY,
};
use crate::options::ZERO_GRANULARITY;
use crate::source::Qcow2Source;
use refcounts::RefcountEditor;
use tables::{ShadowTables, Words};

/// Length in bytes of a piece, unless clusters are longer. Our choice, as for a new image.
const PIECE_LEN: u64 = 256 << 10;

/// Maximum length in bytes of a piece of zeros. Our limit, as for a new image with a backing file.
const MAX_ZERO_LEN: u64 = 64 << 20;

/// Settings of an update.
#[derive(Debug, Clone, Copy)]
pub struct UpdateOptions {
    /// Minimum length in bytes of zeros that are not stored; `None` if all zeros are stored.
    pub zero_unit: Option<u64>,
    /// True if the image is known to read as zeros.
    pub reads_as_zero: bool,
    /// Compression level; `None` if clusters are not compressed.
    pub level: Option<i32>,
    /// Compression algorithm, if the user named one. It must be that of the image.
    pub algorithm: Option<CompressionType>,
}

/// Sink that writes into an existing image.
pub struct Updater {
    /// Outputs of the image and, if it has one, of its data file.
    outputs: Vec<Output>,
    /// ID of the output for guest data.
    data_id: OutputId,
    header: Header,
    /// Number of bitmaps that track writes.
    bitmaps: usize,
    /// Number of clusters that were leaked before.
    leaks_before: u64,
    /// Compressor of the clusters, unless they are stored as they are.
    encoder: Option<Encoder>,
    options: UpdateOptions,
    memory: Memory,
    /// Old content of the disk, if the written part may end within a cluster.
    old: Option<Disk>,
    /// Size in bytes of the disk that is written; `None` until the end of a stream.
    size: Mutex<Option<u64>>,
    state: Mutex<State>,
}

/// Structures that change with each placed piece.
struct State {
    tables: ShadowTables,
    refcounts: RefcountEditor,
}

impl Updater {
    /// Opens the image in `output` to write `device` into it.
    ///
    /// # Errors
    /// If the output is not an intact qcow2 image that the driver can change, or is smaller than the disk.
    /// Nothing has been written in this case.
    pub fn open(
        output: &Output,
        files: &mut dyn NamedFiles,
        device: &Device,
        options: UpdateOptions,
        open: &OpenOptions,
    ) -> Result<Self> {
        let input = output.reopen(&open.memory)?.into_random()?;
        let header = Header::read(&input)?;
        header.check_readable(false)?;
        check_changeable(&header)?;
        let size = (!device.open_ended).then_some(device.size);
        if size.is_some_and(|size| size > header.virtual_size) {
            return Err(too_small(&header, device.size).path(output.location()));
        }
        let encoder = compress::encoder(&header, options)?;
        let bitmaps = bitmaps::count_tracking(&input, &header)?;
        let leaks_before = check_intact(output, open)?;
        let mut outputs = vec![output.clone()];
        if header.has(INCOMPATIBLE_DATA_FILE) {
            let name = header.extensions.data_file.as_deref();
            let name = name.ok_or_else(|| Error::unsupported("the image does not name its data file"))?;
            outputs.push(files.open("data file", name)?);
        }
        let state = State {
            tables: ShadowTables::open(output, &header, &open.memory)?,
            refcounts: RefcountEditor::open(output, &header, &open.memory)?,
        };
        let ends_within_cluster = size.is_none_or(|size| {
            size < header.virtual_size && !size.is_multiple_of(header.shape.cluster_size())
        });
        Ok(Self {
            data_id: OutputId(u32::from(outputs.len() > 1)),
            old: ends_within_cluster.then(|| open_content(&outputs, open)).transpose()?,
            outputs,
            bitmaps,
            leaks_before,
            encoder,
            memory: open.memory.clone(),
            header,
            options,
            size: Mutex::new(size),
            state: Mutex::new(state),
        })
    }

    fn output(&self) -> &Output {
        &self.outputs[OutputId::MAIN.index()]
    }

    /// True if guest data is in a data file, at the guest offsets.
    fn has_data_file(&self) -> bool {
        self.data_id != OutputId::MAIN
    }

    /// True if the data file by itself must stay a raw image of the disk.
    fn has_raw_data_file(&self) -> bool {
        self.has_data_file() && self.header.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    fn shape(&self) -> Shape {
        self.header.shape
    }

    fn has_backing(&self) -> bool {
        self.header.backing_file.is_some()
    }

    /// Returns the unit in bytes in which zeros are found.
    fn zero_unit(&self) -> u64 {
        self.shape().cluster_size().max(ZERO_GRANULARITY).max(self.options.zero_unit.unwrap_or(0))
    }

    /// Places the data of one or more clusters. Joins the writes of adjacent clusters.
    fn place_data(
        &self,
        state: &mut State,
        guest: Range<u64>,
        data: &Range<usize>,
        writes: &mut WriteList,
    ) -> Result<()> {
        let mut run: Option<(u64, Range<usize>)> = None;
        let mut position = guest.start;
        while position < guest.end {
            let end = position.saturating_add(self.shape().cluster_size()).min(guest.end);
            // Within the piece, which is in memory.
            let from = data.start + (position - guest.start) as usize;
            let bytes = from..from + (end - position) as usize;
            let (host, tail) = self.data_cluster(state, position..end)?;
            match &mut run {
                Some((start, known)) if *start + known.len() as u64 == host => known.end = bytes.end,
                _ => {
                    if let Some((start, known)) = run.replace((host, bytes)) {
                        writes.push(self.data_id, start, Bytes::Data(known));
                    }
                }
            }
            if let Some(tail) = tail {
                writes.push(self.data_id, host + (end - position), Bytes::Owned(tail));
            }
            position = end;
        }
        if let Some((start, known)) = run {
            writes.push(self.data_id, start, Bytes::Data(known));
        }
        Ok(())
    }

    /// Decides on the host cluster for the guest bytes `guest`, which start a cluster. Returns its host offset,
    /// and the bytes to write after them if they end before the cluster does.
    fn data_cluster(&self, state: &mut State, guest: Range<u64>) -> Result<(u64, Option<Vec<u8>>)> {
        let State { tables, refcounts } = state;
        let shape = self.shape();
        let words = tables.get(guest.start, refcounts)?;
        let entry = L2Entry(words[0]);
        let known = (!entry.is_compressed()).then(|| entry.host_offset()).filter(|host| *host != 0);
        let host = match known {
            _ if self.has_data_file() => guest.start,
            Some(host) if refcounts.get(host)? == 1 => host,
            _ => refcounts.allocate()?,
        };
        let new = [L2Entry::data(host).0, if shape.extended_l2 { Subclusters::ALL_ALLOCATED.0 } else { 0 }];
        let is_partial = guest.end - guest.start < shape.cluster_size();
        // The rest of a cluster of data stays where it is.
        let tail = (is_partial && words != new).then(|| self.rest_of_cluster(guest.clone())).transpose()?;
        if words != new {
            tables.set(guest.start, new, refcounts)?;
        }
        Ok((host, tail))
    }

    /// Reads the old content after `guest` up to the end of its cluster. Zeros follow the end of the disk.
    fn rest_of_cluster(&self, guest: Range<u64>) -> Result<Vec<u8>> {
        let end = guest.start.saturating_add(self.shape().cluster_size());
        // At most a cluster, 2 MiB.
        let mut bytes = vec![0; (end - guest.end) as usize];
        let known = end.min(self.header.virtual_size).saturating_sub(guest.end);
        if known > 0 {
            let old = self.old.as_ref().ok_or_else(|| Error::malformed("a piece ends within a cluster"))?;
            old.read_at(&mut bytes[..known as usize], guest.end)?;
        }
        Ok(bytes)
    }

    /// Places the zeros of one or more clusters.
    fn place_zeros(&self, state: &mut State, guest: Range<u64>, writes: &mut WriteList) -> Result<()> {
        if self.options.reads_as_zero {
            return Ok(());
        }
        let cluster_size = self.shape().cluster_size();
        let mut position = guest.start;
        while position < guest.end {
            if !self.has_backing() && state.tables.is_empty_at(position)? {
                let reach = 1 << self.shape().l2_reach_bits();
                position = (position & !(reach - 1)).saturating_add(reach);
                continue;
            }
            let end = position.saturating_add(cluster_size);
            let is_whole = end <= guest.end || guest.end >= self.header.virtual_size;
            let words = state.tables.get(position, &mut state.refcounts)?;
            match self.zero_entry(words).filter(|_| is_whole) {
                Some(zeros) if zeros != words => {
                    state.tables.set(position, zeros, &mut state.refcounts)?;
                }
                Some(_) => {}
                // The bytes in a raw data file are zeros as well.
                None if self.reads_as_zero(words) => {}
                None => {
                    let end = end.min(guest.end);
                    let (host, tail) = self.data_cluster(state, position..end)?;
                    writes.push(self.data_id, host, Bytes::Zero(end - position));
                    if let Some(tail) = tail {
                        writes.push(self.data_id, host + (end - position), Bytes::Owned(tail));
                    }
                }
            }
            position = end;
        }
        Ok(())
    }

    /// Returns the entry that makes a cluster with the entry `words` read as zeros, or `None` if only written
    /// zeros can do that.
    fn zero_entry(&self, words: Words) -> Option<Words> {
        if self.has_raw_data_file() {
            return None;
        }
        if self.reads_as_zero(words) {
            return Some(words);
        }
        match (self.header.version >= 3, self.shape().extended_l2) {
            (true, false) => Some([L2Entry::ZEROS.0, 0]),
            (true, true) => Some([0, Subclusters::ALL_ZERO.0]),
            (false, _) => (!self.has_backing()).then_some([0, 0]),
        }
    }

    /// True if every byte of a cluster with the entry `words` reads as zero.
    fn reads_as_zero(&self, words: Words) -> bool {
        let entry = L2Entry(words[0]);
        if entry.is_compressed() {
            return false;
        }
        if self.shape().extended_l2 {
            let subclusters = Subclusters(words[1]);
            return subclusters == Subclusters::ALL_ZERO
                || (!self.has_backing() && !subclusters.any_allocated());
        }
        let has_host = entry.host_offset() != 0 || (self.has_data_file() && entry.is_copied());
        entry.reads_as_zeros() || (!has_host && !self.has_backing())
    }
}

impl Consumer for Updater {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let granule = self.zero_unit();
        Geometry {
            granule,
            granule_required: true,
            piece_len: PIECE_LEN.max(granule),
            max_zero_len: MAX_ZERO_LEN.max(granule),
            ordered: true,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        if !piece.start.is_multiple_of(self.shape().cluster_size()) {
            return Err(Error::malformed("a piece does not start at a cluster boundary"));
        }
        let piece = piece.padded_to_sector(self.header.virtual_size, pool);
        let stores_zeros = self.options.zero_unit.is_none();
        let piece = if stores_zeros { piece.with_zeros_as_data(pool) } else { piece };
        let runs = if stores_zeros {
            std::iter::once(0..piece.data.as_ref().map_or(0, |data| data.len())).collect()
        } else {
            // At most 2 MiB, or the unit that the caller chose.
            piece.nonzero_runs(self.zero_unit() as usize)
        };
        let prepared = Prepared::sparse(piece, runs, true);
        match &self.encoder {
            Some(encoder) => compress::clusters(prepared, encoder, pool, self.shape().cluster_size()),
            None => Ok(prepared),
        }
    }

    fn worker_memory(&self) -> u64 {
        let cluster_size = self.shape().cluster_size();
        self.encoder.as_ref().map_or(0, |encoder| encoder.context_memory(cluster_size))
    }

    fn resize(&self, _device: SinkDevice, size: u64) -> Result<()> {
        if size > self.header.virtual_size {
            return Err(too_small(&self.header, size).path(self.output().location()));
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
        self.header.clear_unknown_autoclear(self.output())?;
        if self.bitmaps > 0 {
            let input = self.output().reopen(&self.memory)?;
            bitmaps::mark_all(input, &self.header, self.output(), &mut lock(&self.state).refcounts)?;
        }
        Ok(Vec::new())
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let mut state = lock(&self.state);
        for part in &prepared.parts {
            if part.guest.end > self.header.virtual_size {
                return Err(too_small(&self.header, part.guest.end).path(self.output().location()));
            }
            match &part.bytes {
                Bytes::Data(range) => self.place_data(&mut state, part.guest.clone(), range, writes)?,
                Bytes::Encoded(range) => {
                    self.place_compressed(&mut state, part.guest.start, range, writes)?
                }
                _ => self.place_zeros(&mut state, part.guest.clone(), writes)?,
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let mut state = lock(&self.state);
        let State { tables, refcounts } = &mut *state;
        let output = self.output();
        tables.write_changed(refcounts)?;
        self.outputs.iter().try_for_each(Output::sync)?;
        refcounts.commit()?;
        output.sync()?;
        tables.switch()?;
        output.sync()?;
        tables.release_replaced(refcounts)?;
        refcounts.write_changed()
    }

    fn leaks_before(&self) -> u64 {
        self.leaks_before
    }

    fn notes(&self) -> Vec<String> {
        let size = lock(&self.size).unwrap_or(0);
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
        let mut notes = Vec::new();
        let kept = self.header.virtual_size.saturating_sub(size);
        if kept > 0 {
            notes.push(format!(
                "the image is larger than the disk: its last {kept} bytes keep their old content"
            ));
        }
        if self.bitmaps > 0 {
            notes.push(format!("{} of its bitmaps mark the whole disk as changed", self.bitmaps));
        }
        notes
    }
}

/// Opens the disk of the image in the first of `outputs` for reading. The second is its data file.
fn open_content(outputs: &[Output], open: &OpenOptions) -> Result<Disk> {
    let (image, data) = (&outputs[OutputId::MAIN.index()], outputs.get(1).cloned());
    let externals = match data {
        Some(data) => Externals::new(Arc::new(WithDataFile {
            data,
            memory: open.memory.clone(),
            others: open.externals.clone(),
        })),
        None => open.externals.clone(),
    };
    let options = OpenOptions { externals, memory: open.memory.clone(), ..OpenOptions::default() };
    let source = Qcow2Source::open(image.reopen(&open.memory)?, &options)?;
    Disk::only(Arc::new(source), "the image")
}

/// Opener of an image whose data file is open for writing.
struct WithDataFile {
    data: Output,
    memory: Memory,
    others: Externals,
}

impl ExternalOpener for WithDataFile {
    fn open_image(
        &self,
        role: &str,
        name: &str,
        from: &Location,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        let options = OpenOptions { externals: self.others.clone(), ..options.clone() };
        self.others.open_image(role, name, from, format, &options)
    }

    fn open_file(&self, _role: &str, _name: &str, _from: &Location) -> Result<Input> {
        self.data.reopen(&self.memory)
    }

    fn open_member(
        &self,
        member: Input,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        self.others.open_member(member, format, options)
    }

    fn decompressed(&self, member: Input, compression: &str) -> Result<Input> {
        self.others.decompressed(member, compression)
    }

    fn saved(&self, stream: Input) -> Result<Input> {
        self.others.saved(stream)
    }

    fn depth(&self) -> usize {
        self.others.depth()
    }
}

/// Refuses an image with features that the driver can't keep intact.
pub fn check_changeable(header: &Header) -> Result<()> {
    if header.encryption != Encryption::None {
        return Err(Error::unsupported("an encrypted image can't be changed in place")
            .at(32)
            .hint("make a new image instead"));
    }
    if header.has(INCOMPATIBLE_DIRTY) {
        return Err(Error::refused("the image was not closed cleanly, so its refcounts may be wrong")
            .at(72)
            .remedied_by(Remedy::Repair));
    }
    Ok(())
}

/// Refuses an image whose tables contradict its refcounts: a cluster that seems free could be in use. Returns
/// the number of leaked clusters.
pub fn check_intact(output: &Output, open: &OpenOptions) -> Result<u64> {
    let report = check::check(output.reopen(&open.memory)?, open)?;
    if report.corruptions == 0 && report.check_errors == 0 {
        return Ok(report.leaks);
    }
    let first = report.findings.first().map(|finding| format!(" ({finding})")).unwrap_or_default();
    Err(Error::refused(format!("the structure of the image is damaged{first}"))
        .path(output.location())
        .remedied_by(Remedy::Repair))
}

fn too_small(header: &Header, size: u64) -> Error {
    Error::refused(format!(
        "the image is too small: a {FORMAT} image of {} bytes, the disk has {size}",
        header.virtual_size
    ))
    .hint("nothing outside the image was changed; enlarge the image first, or make a new one")
}
