//! Checksums: a digest of each device's content that is the same in every format.
//!
//! Many threads read the content. One at a time digests it, in guest order.

use std::sync::Mutex;

use imgtool_core::sync::{into_inner, lock};
use imgtool_core::zero::zero_slices;
use imgtool_core::{
    BufferPool, CancelToken, Consumer, Device, Error, ErrorKind, Geometry, Lane, Location, OpenOptions,
    Prepared, Registry, Result, ResultExt, SinkDevice, SinkPiece,
};
use sha2::{Digest, Sha256};

use crate::monitor::{Counter, Monitor, Phase};
use crate::open::{self, Opened};
use crate::pipeline::{self, Job, Route, Target};
use crate::work::{Gauge, LaneInfo, Part};

/// Length in bytes of a piece. Our choice: long enough that one thread digests a piece while others read the
/// next ones.
const PIECE_LEN: u64 = 1 << 20;

/// Maximum length in bytes of a piece of zeros. Our limit: a cancellation waits until the current piece is
/// digested.
const MAX_ZERO_LEN: u64 = 256 << 20;

/// A digest algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// SHA-256.
    Sha256,
    /// BLAKE3, 256 bits.
    Blake3,
}

impl Algorithm {
    /// Returns the name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Blake3 => "blake3",
        }
    }
}

/// Digest of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceChecksum {
    /// Name of the device; untrusted.
    pub device: String,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Digest in lower-case hexadecimal.
    pub digest: String,
}

/// Digests the selected devices of an image. If a regular file can only be read as a stream, and the stream
/// is not in guest order, digests a temporary copy of it.
///
/// # Errors
/// [`ErrorKind::OutOfOrder`] if any other stream is not in guest order; any error from reading the image.
pub fn checksum(
    registry: &Registry,
    location: &Location,
    request: &ChecksumRequest<'_>,
    monitor: &dyn Monitor,
    cancel: &CancelToken,
) -> Result<(Opened, Vec<DeviceChecksum>)> {
    let opened = open::open(registry, location, request.format, request.options, cancel)?;
    let is_file =
        location.path().and_then(|path| std::fs::metadata(path).ok()).is_some_and(|meta| meta.is_file());
    match digest(&opened, request, monitor, cancel) {
        // An archive may store its clusters in any order. A temporary copy can be read in guest order.
        Err(e) if e.kind() == ErrorKind::OutOfOrder && is_file => {
            drop(opened);
            let opened = open::open_random(registry, location, request.format, request.options, cancel)?;
            let found = digest(&opened, request, monitor, cancel)?;
            Ok((opened, found))
        }
        found => Ok((opened, found?)),
    }
}

/// Settings of [`checksum`].
#[derive(Debug, Clone, Copy)]
pub struct ChecksumRequest<'a> {
    /// Digest algorithm.
    pub algorithm: Algorithm,
    /// Format of the image, if the user states it.
    pub format: Option<&'a str>,
    /// Settings for opening the image.
    pub options: &'a OpenOptions,
    /// Names of the devices to digest; empty for all.
    pub disks: &'a [String],
    /// Number of worker threads; 0 for one per processor.
    pub threads: usize,
}

fn digest(
    opened: &Opened,
    request: &ChecksumRequest<'_>,
    monitor: &dyn Monitor,
    cancel: &CancelToken,
) -> Result<Vec<DeviceChecksum>> {
    let devices = opened.select(request.disks)?;
    let lane = |device: &Device| LaneInfo {
        name: device.name.clone(),
        total: (!device.open_ended).then_some(device.size),
    };
    let lanes = devices.iter().map(lane).collect();
    let copied: Vec<_> = (0..).map(Lane).zip(devices.iter().map(|device| device.id)).collect();
    // Zeros are digested like data.
    let part = Part::new(&*opened.image, &copied, opened.consumed.clone(), opened.stored_len, true);
    let gauge = Gauge::new(lanes, vec![part], Box::new(|| 0));
    let counter = Counter::begin(monitor, Phase::Checksum, gauge, None);
    let route = |(number, device): (u32, &Device)| Route {
        from: device.id,
        target: 0,
        to: SinkDevice(number),
        lane: Lane(number),
    };
    let digester = Digester::new(request.algorithm, &devices);
    let job = Job {
        targets: vec![Target::Consumer(&digester)],
        routes: (0..).zip(&devices).map(route).collect(),
        taps: Vec::new(),
        threads: opened.workers(request.threads),
        progress: &counter,
        cancel: cancel.clone(),
        memory: request.options.memory.clone(),
    };
    pipeline::copy(&*opened.image, &job).in_file(&opened.location)?;
    counter.end_part();
    monitor.end();
    digester.finish().in_file(&opened.location)
}

enum Hasher {
    Sha256(Sha256),
    Blake3(Box<blake3::Hasher>),
}

impl Hasher {
    fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Blake3 => Self::Blake3(Box::default()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
        }
    }

    fn zeros(&mut self, len: u64) {
        zero_slices(len).for_each(|zeros| self.update(zeros));
    }

    fn hex(self) -> String {
        match self {
            Self::Sha256(hasher) => hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            Self::Blake3(hasher) => hasher.finalize().to_hex().to_string(),
        }
    }
}

/// Unfinished digest of a device.
struct DeviceDigest {
    name: String,
    size: u64,
    position: u64,
    hasher: Hasher,
}

/// Consumer that digests each device.
struct Digester(Vec<Mutex<DeviceDigest>>);

impl Digester {
    fn new(algorithm: Algorithm, devices: &[Device]) -> Self {
        let begin = |device: &Device| {
            let (name, hasher) = (device.name.clone(), Hasher::new(algorithm));
            Mutex::new(DeviceDigest { name, size: device.size, position: 0, hasher })
        };
        Self(devices.iter().map(begin).collect())
    }

    fn finish(self) -> Result<Vec<DeviceChecksum>> {
        let finish = |device: DeviceDigest| {
            if device.position != device.size {
                let message = format!("only {} of {} bytes are in the image", device.position, device.size);
                return Err(Error::corrupt(message).device(device.name));
            }
            let digest = device.hasher.hex();
            Ok(DeviceChecksum { device: device.name, virtual_size: device.size, digest })
        };
        self.0.into_iter().map(|device| finish(into_inner(device))).collect()
    }
}

impl Consumer for Digester {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len: PIECE_LEN,
            max_zero_len: MAX_ZERO_LEN,
            ordered: true,
        }
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        Ok(Prepared::consumed(piece))
    }

    fn settle(&self, prepared: &Prepared) -> Result<()> {
        let mut device = lock(&self.0[prepared.device.index()]);
        if prepared.start != device.position {
            return Err(Error::out_of_order("the stream is not in guest order, which a digest requires")
                .device(&*device.name)
                .hint("save the stream to a file first"));
        }
        match prepared.data.as_deref() {
            Some(bytes) => device.hasher.update(bytes),
            None => device.hasher.zeros(prepared.len),
        }
        device.position += prepared.len;
        Ok(())
    }

    fn resize(&self, device: SinkDevice, size: u64) -> Result<()> {
        lock(&self.0[device.index()]).size = size;
        Ok(())
    }
}
