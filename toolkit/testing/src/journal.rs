//! [`Journal`], a target in memory that records every write, and the states in which a crash could leave it.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{
    CreateOptions, Device, Driver, ImageSink, Manifest, Memory, NamedFiles, OpenOptions, Output, ReadAt,
    Result, WriteAt,
};

use crate::conformance::{Image, MemorySource, fill_sink};
use crate::images::noise;

/// Change of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    Write { position: usize, bytes: Vec<u8> },
    SetLen(usize),
    Sync,
}

/// Records the changes of an existing file in memory.
#[derive(Debug, Clone)]
pub struct Journal(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    before: Vec<u8>,
    now: Vec<u8>,
    events: Vec<Event>,
}

impl Journal {
    /// Begins with a file of these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State { before: bytes.clone(), now: bytes, events: Vec::new() })))
    }

    /// Returns an output that writes into the file.
    pub fn output(&self) -> Output {
        Output::from_write_at("image", Box::new(self.clone()))
    }

    /// Returns the file as it is now.
    pub fn now(&self) -> Vec<u8> {
        lock(&self.0).now.clone()
    }

    /// Calls `see` with the file before the first write and after each one, in order.
    pub fn each_prefix(&self, mut see: impl FnMut(&[u8])) {
        let state = lock(&self.0);
        let mut bytes = state.before.clone();
        see(&bytes);
        for event in &state.events {
            apply(&mut bytes, event);
            if *event != Event::Sync {
                see(&bytes);
            }
        }
    }

    /// Calls `see` with files that a crash could leave behind: every write before a flush, and any of those
    /// after it. For each pair of flushes, tries `rounds` choices, which `seed` decides.
    pub fn each_crash(&self, seed: u64, rounds: u64, mut see: impl FnMut(&[u8])) {
        let state = lock(&self.0);
        let mut durable = state.before.clone();
        for (number, span) in state.events.split(|event| *event == Event::Sync).enumerate() {
            for round in 0..rounds {
                let choices = noise(seed ^ (number as u64) << 32 ^ round, span.len());
                let mut bytes = durable.clone();
                let chosen = span.iter().zip(&choices).filter(|(_, choice)| **choice & 2 != 0);
                chosen.for_each(|(event, _)| apply(&mut bytes, event));
                see(&bytes);
            }
            span.iter().for_each(|event| apply(&mut durable, event));
        }
    }

    /// Opens the image in the file to write a disk of `size` bytes into it.
    ///
    /// # Errors
    /// Any error of [`imgtool_core::ImageWriter::update`].
    pub fn update(
        &self,
        driver: &dyn Driver,
        options: &CreateOptions,
        size: u64,
    ) -> Result<Box<dyn ImageSink>> {
        let manifest = Manifest { devices: vec![Device::disk(0, "disk", size)], ..Manifest::default() };
        let options = driver.writer(options)?;
        options.update(&self.output(), &mut NoFiles, &manifest, false, &OpenOptions::default())
    }

    /// Writes `disk` into the image in the file.
    ///
    /// # Errors
    /// Any error of the driver.
    pub fn write(&self, driver: &dyn Driver, options: &CreateOptions, disk: &[u8]) -> Result<()> {
        let sink = self.update(driver, options, disk.len() as u64)?;
        fill_sink(&MemorySource::new(&Image::from_bytes("new", disk)), &*sink, 2)?;
        self.output().sync()
    }

    fn record(&self, event: Event) {
        let mut state = lock(&self.0);
        apply(&mut state.now, &event);
        state.events.push(event);
    }
}

/// Images without other files.
struct NoFiles;

impl NamedFiles for NoFiles {
    fn open(&mut self, role: &str, name: &str) -> Result<Output> {
        panic!("{role} {name}")
    }
}

/// Returns the content of an image that had `old` and into which the disk `new` was written: zeros fill the last
/// sector of the disk.
pub fn overwritten(old: &[u8], new: &[u8]) -> Vec<u8> {
    let end = new.len().next_multiple_of(512).min(old.len());
    let mut bytes = new.to_vec();
    bytes.resize(end, 0);
    bytes.extend_from_slice(&old[end..]);
    bytes
}

/// True if every sector of `found` is that of `old` or that of `new`.
pub fn is_old_or_new(found: &[u8], old: &[u8], new: &[u8]) -> bool {
    let sectors = found.chunks(512).zip(old.chunks(512)).zip(new.chunks(512));
    sectors.into_iter().all(|((found, old), new)| found == old || found == new)
}

fn apply(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write { position, bytes: new } => {
            let end = position + new.len();
            if end > bytes.len() {
                bytes.resize(end, 0);
            }
            bytes[*position..end].copy_from_slice(new);
        }
        Event::SetLen(len) => bytes.resize(*len, 0),
        Event::Sync => {}
    }
}

impl WriteAt for Journal {
    fn write_vectored_at(&self, slices: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
        // One event for each sector-sized part would be closer to a disk; the writers order whole writes.
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let len = bytes.len();
        self.record(Event::Write { position: position as usize, bytes });
        Ok(len)
    }

    fn read_at(&self, buf: &mut [u8], position: u64) -> io::Result<usize> {
        let state = lock(&self.0);
        let rest = state.now.get(position as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.record(Event::SetLen(len as usize));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.record(Event::Sync);
        Ok(())
    }

    fn capacity(&self) -> Option<u64> {
        None
    }

    fn reads_as_zero(&self) -> bool {
        false
    }

    fn reopen(&self, _memory: &Memory) -> io::Result<Arc<dyn ReadAt>> {
        Ok(Arc::new(self.clone()))
    }
}

impl ReadAt for Journal {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        match WriteAt::read_at(self, buf, position)? {
            count if count == buf.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn len(&self) -> u64 {
        lock(&self.0).now.len() as u64
    }
}
