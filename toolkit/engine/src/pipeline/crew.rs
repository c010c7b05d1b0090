//! Memory of a copy: how many workers run, and how many pieces may be in flight.

use imgtool_core::{Access, Lease, Memory, RandomAccess, Result, StreamAccess};

use super::Job;

/// Number of bytes in flight per worker beyond which the window shrinks to three pieces. Our limit.
const WINDOW_BYTES: u64 = 2 << 20;

/// Divisor of the memory limit: all buffers in flight may take half of it. If large pieces would exceed it,
/// fewer workers run.
const BUFFERS_DIVISOR: u64 = 2;

/// Maximum number of worker threads. Our limit: with more, placing pieces in order is the bottleneck.
pub const MAX_THREADS: usize = 64;

/// Memory in bytes of a worker besides its pieces: the used part of its stack, and its part of the
/// allocator's arenas. Measured with 64 workers.
const WORKER: u64 = 256 << 10;

/// Part of the free memory that stays free for caches: one quarter.
const CACHES_DIVISOR: u64 = 4;

/// Maximum number of bytes of incomplete granules of a stream. Our limit: a quarter of the default memory of
/// a conversion.
const MAX_PENDING: u64 = 64 << 20;

/// Divisor of the memory limit for the same bytes, if the limit is below the default.
const PENDING_DIVISOR: u64 = 4;

/// Granule in bytes up to which no pieces are gathered: the alignment of the pieces of every stream (VMA
/// clusters).
pub(super) const STREAM_ALIGNMENT: u64 = 64 << 10;

/// Workers of a copy, and the memory that they borrow.
#[derive(Debug)]
pub(super) struct Crew {
    /// Number of workers.
    pub(super) threads: usize,
    /// Maximum number of pieces in flight.
    pub(super) window: usize,
    _lease: Lease,
}

impl Crew {
    /// Borrows the memory for as many workers as are requested and fit into it.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] if not even one worker with one piece fits.
    pub(super) fn hire(job: &Job<'_>, source: Access<'_>, largest_piece: u64) -> Result<Self> {
        // A piece may be in memory twice: as read and as encoded.
        let piece = largest_piece.max(1).saturating_mul(2);
        let each = WORKER.saturating_add(beside_pieces(job, source));
        let memory = &job.memory;
        let least = each.saturating_add(piece);
        if memory.free() < least {
            return Err(memory.refusal(least, "a worker"));
        }
        let per_thread = window_per_thread(largest_piece);
        let buffers = memory.limit() / BUFFERS_DIVISOR / piece.saturating_mul(per_thread);
        let available = memory.free() - memory.free() / CACHES_DIVISOR;
        let cost = each.saturating_add(piece.saturating_mul(per_thread));
        let affordable = usize::try_from(buffers.min(available / cost)).unwrap_or(MAX_THREADS);
        let (threads, window) = match affordable {
            // One worker; as many pieces as fit.
            0 => (1, ((available.saturating_sub(each)) / piece).clamp(1, per_thread)),
            _ => {
                let threads = requested(job.threads).min(affordable);
                (threads, per_thread * threads as u64)
            }
        };
        let bytes = each.saturating_mul(threads as u64).saturating_add(piece.saturating_mul(window));
        let lease = memory.lease(bytes, "a worker")?;
        // At most 64 workers with 8 pieces each.
        Ok(Self { threads, window: window as usize, _lease: lease })
    }
}

/// Returns the memory in bytes that a worker needs for decoders and compressors.
fn beside_pieces(job: &Job<'_>, source: Access<'_>) -> u64 {
    let reader = |random: &dyn RandomAccess| {
        job.routes.iter().map(|route| random.reader_memory(route.from)).max().unwrap_or(0)
    };
    let reader = source.random().map_or(0, reader);
    let consumer = job.targets.iter().map(|target| target.worker_memory()).max().unwrap_or(0);
    reader.saturating_add(consumer)
}

/// Returns the maximum number of pieces in flight per worker. Our limit: with two, a worker can continue
/// while a slow piece delays the next. With small pieces, a larger window wakes a waiting worker less often
/// (measured: a copy in memory takes 2 % less time with 8 than with 3).
fn window_per_thread(largest_piece: u64) -> u64 {
    (WINDOW_BYTES / largest_piece.max(1)).clamp(3, 8)
}

/// Returns the requested number of workers, at most [`MAX_THREADS`]; 0 means one per processor.
fn requested(threads: usize) -> usize {
    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    threads.clamp(1, MAX_THREADS)
}

/// Returns the maximum number of bytes of incomplete granules. The amount decides where a shuffled stream is
/// cut, so it depends on the limit alone.
pub(super) fn max_pending(memory: &Memory) -> u64 {
    MAX_PENDING.min(memory.limit() / PENDING_DIVISOR)
}

/// Way in which the content of an image arrives if it comes in the order of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// In guest order within each device.
    InOrder,
    /// In any order.
    AnyOrder,
    /// Not at all: the workers read it later.
    Unread,
}

impl Arrival {
    pub(super) fn of_stream(stream: &dyn StreamAccess) -> Self {
        if stream.in_order() { Self::InOrder } else { Self::AnyOrder }
    }
}

/// Borrows the memory for incomplete granules that a stream will probably need. The loan can be raised up to
/// [`max_pending`].
///
/// # Errors
/// [`imgtool_core::ErrorKind::LimitExceeded`] if less is free.
pub(super) fn pending_granules(memory: &Memory, arrival: Arrival, granule: u64) -> Result<Lease> {
    let bytes = match arrival {
        _ if granule <= STREAM_ALIGNMENT => 0,
        Arrival::Unread => 0,
        // The pieces complete a granule before they begin the next.
        Arrival::InOrder => granule.saturating_mul(2),
        Arrival::AnyOrder => max_pending(memory),
    };
    memory.lease(bytes, PENDING)
}

/// Purpose of [`pending_granules`], for errors.
pub(super) const PENDING: &str = "the incomplete clusters of a stream";

#[cfg(test)]
mod tests {
    use imgtool_core::{CancelToken, ErrorKind, NoProgress, Remedy};

    use super::*;

    /// Source whose content nobody reads.
    struct Unread;

    impl RandomAccess for Unread {
        fn extents(
            &self,
            _device: imgtool_core::DeviceId,
            _range: std::ops::Range<u64>,
        ) -> Result<Vec<imgtool_core::Extent>> {
            Ok(Vec::new())
        }

        fn read_at(&self, _device: imgtool_core::DeviceId, _buf: &mut [u8], _guest: u64) -> Result<()> {
            Ok(())
        }
    }

    fn hire(memory: &Memory, threads: usize, piece: u64) -> Result<(usize, usize)> {
        let job = Job {
            targets: Vec::new(),
            routes: Vec::new(),
            taps: Vec::new(),
            threads,
            progress: &NoProgress,
            cancel: CancelToken::new(),
            memory: memory.clone(),
        };
        Crew::hire(&job, Access::Random(&Unread), piece).map(|crew| (crew.threads, crew.window))
    }

    #[test]
    fn large_pieces_and_little_memory_reduce_the_workers() {
        let memory = Memory::default();
        assert_eq!(hire(&memory, 4, 256 << 10).ok(), Some((4, 32)));
        assert_eq!(hire(&memory, 64, 256 << 10).ok(), Some((32, 256)));
        assert_eq!(hire(&memory, 64, 8 << 20).ok(), Some((2, 6)));
        let window = memory.lease(128 << 20, "a window").expect("free");
        let _index = memory.lease(80 << 20, "an index").expect("free");
        assert_eq!(hire(&memory, 64, 8 << 20).ok(), Some((1, 1)));
        let error = hire(&memory, 1, 12 << 20).expect_err("24 MiB are free");
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
        assert_eq!(error.remedy(), Some(&Remedy::AllowMemory { bytes: 330 << 20 }));
        drop(window);
        assert_eq!(hire(&memory, 1, 12 << 20).ok(), Some((1, 3)));
    }
}
