//! A sink that digests what it is given, in order.

use std::sync::{Mutex, MutexGuard, PoisonError};

use imgtool_toolkit::{
    BufferPool, Device, DeviceId, Error, Geometry, ImageSink, Output, Piece, Prepared, Result, WriteList,
};
use sha2::{Digest, Sha256};

use super::out_of_order;
use crate::args::Algorithm;

/// Bytes in a piece: one is digested while others are read.
const PIECE_LEN: u64 = 1 << 20;

/// The longest piece of zeros: digesting it must not keep a signal waiting for long.
const MAX_ZERO_LEN: u64 = 256 << 20;

/// Zeros, for digests that have to see each of them.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The message by which a stream out of order is known.
pub(super) const OUT_OF_ORDER: &str = "the content does not come in order, and a digest needs it so";

pub(super) fn is_out_of_order(error: &Error) -> bool {
    error.message() == OUT_OF_ORDER
}

pub(super) fn name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::Sha256 => "sha256",
        Algorithm::Blake3 => "blake3",
    }
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

    fn zeros(&mut self, mut len: u64) {
        while len > 0 {
            let count = len.min(ZEROS.len() as u64);
            self.update(&ZEROS[..usize::try_from(count).unwrap_or(ZEROS.len())]);
            len -= count;
        }
    }

    fn hex(self) -> String {
        match self {
            Self::Sha256(hasher) => hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            Self::Blake3(hasher) => hasher.finalize().to_hex().to_string(),
        }
    }
}

struct Lane {
    name: String,
    size: u64,
    position: u64,
    hasher: Hasher,
}

/// Digests each device.
pub(super) struct DigestSink {
    lanes: Vec<Mutex<Lane>>,
    nowhere: Output,
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DigestSink {
    pub(super) fn new(algorithm: Algorithm, devices: &[Device]) -> Self {
        let lane = |device: &Device| {
            let (name, hasher) = (device.name.clone(), Hasher::new(algorithm));
            Mutex::new(Lane { name, size: device.size, position: 0, hasher })
        };
        Self {
            lanes: devices.iter().map(lane).collect(),
            nowhere: Output::from_writer("", Box::new(std::io::sink())),
        }
    }

    /// Size and digest of each device.
    pub(super) fn into_digests(self) -> Result<Vec<(u64, String)>> {
        let lanes =
            self.lanes.into_iter().map(|lane| lane.into_inner().unwrap_or_else(PoisonError::into_inner));
        lanes
            .map(|lane| {
                if lane.position == lane.size {
                    Ok((lane.size, lane.hasher.hex()))
                } else {
                    Err(Error::corrupt(format!("{} of {} bytes were there", lane.position, lane.size))
                        .device(lane.name))
                }
            })
            .collect()
    }
}

impl ImageSink for DigestSink {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len: PIECE_LEN,
            max_zero_len: MAX_ZERO_LEN,
            ordered: true,
        }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.nowhere
    }

    fn prepare(&self, piece: Piece, _pool: &BufferPool) -> Result<Prepared> {
        Ok(Prepared::taken(piece))
    }

    fn place(&self, prepared: &Prepared, _writes: &mut WriteList) -> Result<()> {
        let mut lane = lock(&self.lanes[prepared.device.0 as usize]);
        if prepared.start != lane.position {
            return Err(out_of_order(&lane.name));
        }
        match prepared.data.as_deref() {
            Some(bytes) => lane.hasher.update(bytes),
            None => lane.hasher.zeros(prepared.len),
        }
        lane.position += prepared.len;
        Ok(())
    }

    fn resize(&self, device: DeviceId, size: u64) -> Result<()> {
        lock(&self.lanes[device.0 as usize]).size = size;
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}
