//! Compressed clusters: decoding and encoding, with contexts that threads reuse.

use std::sync::{Arc, Mutex, OnceLock};

use flate2::{Decompress, FlushDecompress};
use imgtool_core::incompressible::looks_incompressible;
use imgtool_core::sync::lock;
use imgtool_core::{Cache, Error, Lease, Memory, RandomInput, Result};
use libdeflater::{CompressionLvl, Compressor, Decompressor};
use zstd::zstd_safe::{CCtx, CParameter, DCtx, InBuffer, OutBuffer, ResetDirective};

use crate::layout::entry::CompressedRange;
use crate::layout::header::CompressionType;

/// Default deflate level. Our choice: it compresses 3.3 times as fast as qemu-img, into 4 % fewer bytes.
pub const DEFAULT_DEFLATE_LEVEL: i32 = 3;
/// Default zstd level, the same as in the library and in qemu-img.
pub const DEFAULT_ZSTD_LEVEL: i32 = 3;

/// Maximum number of decoded clusters kept for reads of less than a cluster. Our limit: 8 MiB with the
/// largest clusters.
const MAX_RECENT_CLUSTERS: usize = 4;

/// Memory in bytes for the decoded clusters of an image and, in a backing image, for its idle decoders. Our
/// limit, divided by one more than the image's depth in the chain.
const MAX_RECENT_BYTES: usize = 8 << 20;

/// Memory in bytes of a decoder besides its buffers. Measured: 160 KiB for zstd.
const CONTEXT_BYTES: u64 = 160 << 10;

/// Memory in bytes of a deflate compressor, of levels 1 to 9 and of levels 10 to 12. Measured with libdeflate
/// 1.26: 0.2 to 0.7 MiB, and 9 MiB.
const DEFLATE_BYTES: [u64; 2] = [1 << 20, 10 << 20];

/// Decoder for the compressed clusters of an image, shared by several threads.
pub struct Decoder {
    compression: CompressionType,
    cluster_size: usize,
    idle: Mutex<Vec<DecodeContext>>,
    /// Decoded clusters of the latest partial reads, by host offset; `None` deep in a chain, where the
    /// image's share of the memory is less than a cluster.
    recent: Option<Mutex<Cache<u64, Arc<Vec<u8>>>>>,
    max_idle: usize,
    /// Memory for the decoded clusters.
    _lease: Lease,
}

struct DecodeContext {
    /// Buffer for compressed bytes.
    stored: Vec<u8>,
    codec: DecodeCodec,
}

enum DecodeCodec {
    Deflate(Decompressor),
    Zstd(DCtx<'static>),
}

impl Decoder {
    /// Creates a decoder for clusters of `cluster_size` bytes. `depth` is the number of overlays above
    /// the image, which borrows from `memory`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] if less is free.
    pub fn new(
        compression: CompressionType,
        cluster_size: u64,
        depth: usize,
        memory: &Memory,
    ) -> Result<Self> {
        // A cluster is at most 2 MiB.
        let cluster_size = cluster_size as usize;
        let share = memory.cache_share(MAX_RECENT_BYTES as u64) as usize / (depth + 1) / cluster_size;
        let keeps_all = depth == 0 && memory.cache_share(2) == 2;
        let lease = memory.lease((share * cluster_size) as u64, "decoded qcow2 clusters")?;
        Ok(Self {
            compression,
            cluster_size,
            idle: Mutex::default(),
            recent: (share > 0).then(|| Mutex::new(Cache::new(share.min(MAX_RECENT_CLUSTERS)))),
            // A single top image keeps one per thread. Backing images keep fewer, because a chain may have
            // many, and so do the images of a conversion with many.
            max_idle: if keeps_all { usize::MAX } else { share / 2 },
            _lease: lease,
        })
    }

    /// Returns the memory in bytes of a decoder in use: the stored bytes of a cluster, and zstd's window.
    pub fn context_memory(&self) -> u64 {
        2 * self.cluster_size as u64 + CONTEXT_BYTES
    }

    /// Fills `buf` with the bytes of a decoded cluster from byte `within` on.
    pub fn read(
        &self,
        input: &RandomInput,
        range: CompressedRange,
        buf: &mut [u8],
        within: usize,
    ) -> Result<()> {
        if within == 0 && buf.len() == self.cluster_size {
            return self.decode(input, range, buf);
        }
        let known = self.recent.as_ref().and_then(|recent| lock(recent).get(&range.host_offset).cloned());
        let cluster = match known {
            Some(cluster) => cluster,
            None => {
                let mut cluster = vec![0; self.cluster_size];
                self.decode(input, range, &mut cluster)?;
                let cluster = Arc::new(cluster);
                if let Some(recent) = &self.recent {
                    lock(recent).insert(range.host_offset, Arc::clone(&cluster));
                }
                cluster
            }
        };
        buf.copy_from_slice(&cluster[within..within + buf.len()]);
        Ok(())
    }

    /// Decodes a whole cluster into `cluster`.
    fn decode(&self, input: &RandomInput, range: CompressedRange, cluster: &mut [u8]) -> Result<()> {
        let idle = lock(&self.idle).pop();
        let mut context = match idle {
            Some(context) => context,
            None => DecodeContext { stored: Vec::new(), codec: self.codec()? },
        };
        // The file may end within the last sector of its last cluster.
        let len = range.max_len.min(input.len().saturating_sub(range.host_offset));
        let len = usize::try_from(len).unwrap_or(0);
        if len == 0 {
            return Err(Error::corrupt(format!(
                "a compressed cluster is at offset {}, beyond the end of the file at {}",
                range.host_offset,
                input.len()
            ))
            .at(range.host_offset)
            .hint("the file is cut short: copy it again, or use a backup"));
        }
        if context.stored.len() < len {
            context.stored.resize(len, 0);
        }
        let stored = &mut context.stored[..len];
        input.read_exact_at(stored, range.host_offset)?;
        context.codec.decode(stored, cluster).map_err(|why| {
            let cut = if (len as u64) < range.max_len { "; the file ends within it" } else { "" };
            Error::corrupt(format!(
                "cannot decode a compressed cluster ({}): {why}{cut}",
                self.compression.name()
            ))
            .at(range.host_offset)
        })?;
        let mut idle = lock(&self.idle);
        if idle.len() < self.max_idle {
            idle.push(context);
        }
        Ok(())
    }

    fn codec(&self) -> Result<DecodeCodec> {
        Ok(match self.compression {
            CompressionType::Zlib => DecodeCodec::Deflate(Decompressor::new()),
            CompressionType::Zstd => DecodeCodec::Zstd(
                DCtx::try_create().ok_or_else(|| Error::limit("no memory for a zstd decoder"))?,
            ),
        })
    }
}

impl DecodeCodec {
    /// Decodes `stored` into `cluster`, or returns the reason for the failure. Ignores trailing bytes.
    fn decode(&mut self, stored: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
        match self {
            DecodeCodec::Deflate(decompressor) => match decompressor.deflate_decompress(stored, cluster) {
                Ok(len) if len == cluster.len() => Ok(()),
                Ok(_) => Err("it decodes to less than a cluster"),
                Err(_) => inflate_to_full(stored, cluster),
            },
            DecodeCodec::Zstd(context) => unzstd(context, stored, cluster),
        }
    }
}

/// Decodes a deflate stream that continues after the end of the cluster or is not terminated. Both are legal,
/// as "decompression stops when it has produced a cluster of data" (specification, "Compressed Clusters
/// Descriptor"), but libdeflate rejects them.
fn inflate_to_full(stored: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    let mut inflate = Decompress::new(false);
    match inflate.decompress(stored, cluster, FlushDecompress::Finish) {
        Ok(_) if inflate.total_out() == cluster.len() as u64 => Ok(()),
        Ok(_) => Err("it decodes to less than a cluster"),
        Err(_) => Err("the data is damaged"),
    }
}

/// Decodes zstd frames until the cluster is full and the last frame has ended. A frame that continues is
/// damage: no writer makes one, qemu-img rejects it too, and its checksum would go unverified.
fn unzstd(context: &mut DCtx<'static>, stored: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    context.reset(ResetDirective::SessionOnly).map_err(|_| "cannot reset the decoder")?;
    let cluster_size = cluster.len();
    let mut input = InBuffer::around(stored);
    let mut output = OutBuffer::around(cluster);
    loop {
        let before = (input.pos, output.pos());
        let rest = context.decompress_stream(&mut output, &mut input).map_err(|_| "the data is damaged")?;
        let is_full = output.pos() == cluster_size;
        if is_full && rest == 0 {
            return Ok(());
        }
        if (input.pos, output.pos()) == before {
            let [more, less] = ["it decodes to more than a cluster", "it decodes to less than a cluster"];
            return Err(if is_full { more } else { less });
        }
    }
}

/// Returns the compression level: `level` if the algorithm supports it, the algorithm's default for `None`.
pub fn check_level(compression: CompressionType, level: Option<i32>) -> Result<i32> {
    let (default, allowed) = match compression {
        // libdeflate's level 0 does not compress.
        CompressionType::Zlib => (DEFAULT_DEFLATE_LEVEL, 1..=12),
        CompressionType::Zstd => (DEFAULT_ZSTD_LEVEL, -7..=19),
    };
    let level = level.unwrap_or(default);
    if allowed.contains(&level) {
        return Ok(level);
    }
    Err(Error::usage(format!(
        "{} level {level} is not within {}..{}",
        compression.name(),
        allowed.start(),
        allowed.end()
    )))
}

/// Encoder for the clusters of a new image, shared by several threads.
pub struct Encoder {
    compression: CompressionType,
    level: i32,
    idle: Mutex<Vec<EncodeCodec>>,
    /// Memory in bytes of a context for clusters of the images' size.
    context_memory: OnceLock<u64>,
}

enum EncodeCodec {
    Deflate(Compressor),
    Zstd(CCtx<'static>),
}

impl Encoder {
    /// Creates an encoder. `level` must come from [`check_level`].
    pub fn new(compression: CompressionType, level: i32) -> Self {
        Self { compression, level, idle: Mutex::default(), context_memory: OnceLock::new() }
    }

    /// Returns a context for one thread, which gives it back with [`Encoder::give_back`].
    pub fn context(&self) -> Result<EncodeContext> {
        if let Some(codec) = lock(&self.idle).pop() {
            return Ok(EncodeContext(codec));
        }
        let no_context = || Error::limit("no memory for a compressor");
        let codec = match self.compression {
            CompressionType::Zlib => {
                let level = CompressionLvl::new(self.level).map_err(|_| no_context())?;
                EncodeCodec::Deflate(Compressor::new(level))
            }
            CompressionType::Zstd => {
                let mut context = CCtx::try_create().ok_or_else(no_context)?;
                context.set_parameter(CParameter::CompressionLevel(self.level)).map_err(|_| no_context())?;
                EncodeCodec::Zstd(context)
            }
        };
        Ok(EncodeContext(codec))
    }

    /// Returns the memory in bytes of a context for clusters of `cluster_size` bytes. zstd's depends on the
    /// level and the cluster size, so the first context compresses a cluster, and is measured.
    pub fn context_memory(&self, cluster_size: u64) -> u64 {
        let measure = || match self.compression {
            CompressionType::Zlib => DEFLATE_BYTES[usize::from(self.level >= 10)],
            CompressionType::Zstd => {
                let Ok(mut context) = self.context() else { return 0 };
                let cluster = vec![0; cluster_size as usize];
                context.encode(&cluster, &mut vec![0; cluster_size as usize]);
                let bytes = match &context.0 {
                    EncodeCodec::Zstd(context) => context.sizeof() as u64,
                    EncodeCodec::Deflate(_) => 0,
                };
                self.give_back(context);
                bytes
            }
        };
        *self.context_memory.get_or_init(measure)
    }

    /// Takes back a context, for reuse with another piece.
    pub fn give_back(&self, context: EncodeContext) {
        lock(&self.idle).push(context.0);
    }
}

/// Compressor of one thread.
pub struct EncodeContext(EncodeCodec);

impl EncodeContext {
    /// Compresses `cluster` into `out`. Returns the compressed length in bytes, or `None` if `out` is too
    /// short or the result would not be smaller than the cluster, or hardly.
    pub fn encode(&mut self, cluster: &[u8], out: &mut [u8]) -> Option<usize> {
        let max_len = out.len().min(cluster.len().checked_sub(1)?);
        let out = &mut out[..max_len];
        match &mut self.0 {
            // zstd looks for such data by itself.
            EncodeCodec::Deflate(_) if looks_incompressible(cluster) => None,
            EncodeCodec::Deflate(compressor) => compressor.deflate_compress(cluster, out).ok(),
            EncodeCodec::Zstd(context) => context.compress2(out, cluster).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A longer frame shows damage, such as a changed cluster size, and its checksum would go unverified.
    #[test]
    fn refuses_a_zstd_frame_that_continues_after_the_cluster() {
        let text: Vec<u8> = (0..2000u32).flat_map(|i| (i % 300).to_be_bytes()).collect();
        let decode = |stored: &[u8], len: usize| {
            let mut cluster = vec![0; len];
            let result = DecodeCodec::Zstd(DCtx::create()).decode(stored, &mut cluster);
            assert!(result.is_err() || cluster == text[..len]);
            result
        };
        let mut context = CCtx::create();
        context.set_parameter(CParameter::ChecksumFlag(true)).unwrap();
        for has_len in [true, false] {
            context.set_parameter(CParameter::ContentSizeFlag(has_len)).unwrap();
            let mut stored = Vec::with_capacity(text.len());
            context.compress2(&mut stored, &text).unwrap();
            assert_eq!(decode(&stored, text.len()), Ok(()));
            assert_eq!(decode(&stored, text.len() / 2), Err("it decodes to more than a cluster"));
            assert_eq!(decode(&stored, text.len() + 1), Err("it decodes to less than a cluster"));
            // Sectors are stored as a whole, so other clusters may follow.
            assert_eq!(decode(&[&stored[..], &[7; 100]].concat(), text.len()), Ok(()));
            *stored.last_mut().unwrap() ^= 1;
            assert_eq!(decode(&stored, text.len()), Err("the data is damaged"));
        }
    }

    #[test]
    fn decodes_a_deflate_stream_that_continues_after_the_cluster() {
        let text: Vec<u8> = (0..2000u32).flat_map(|i| (i % 300).to_be_bytes()).collect();
        let encoder = Encoder::new(CompressionType::Zlib, 6);
        let mut stored = vec![0; text.len()];
        let len = encoder.context().unwrap().encode(&text, &mut stored).unwrap();
        let mut cluster = vec![0; 4096];
        let mut codec = DecodeCodec::Deflate(Decompressor::new());
        codec.decode(&stored[..len], &mut cluster).unwrap();
        assert_eq!(cluster, text[..4096]);
        let mut larger = vec![0; text.len() + 1];
        assert!(codec.decode(&stored[..len], &mut larger).is_err());
        assert!(codec.decode(&stored[..len / 2], &mut vec![0; text.len()]).is_err());
    }

    #[test]
    fn decodes_several_zstd_frames_followed_by_padding() {
        let mut stored = zstd::bulk::compress(&[7; 300], 3).unwrap();
        stored.extend(zstd::bulk::compress(&[8; 212], 3).unwrap());
        stored.extend([0; 100]);
        let mut cluster = vec![0; 512];
        let mut codec = DecodeCodec::Zstd(DCtx::create());
        codec.decode(&stored, &mut cluster).unwrap();
        assert!(cluster[..300].iter().all(|b| *b == 7) && cluster[300..].iter().all(|b| *b == 8));
        assert!(codec.decode(&stored[..20], &mut cluster).is_err());
        codec.decode(&stored, &mut cluster).unwrap();
    }

    #[test]
    fn encoded_clusters_are_always_shorter() {
        let noise: Vec<u8> =
            (0..4096u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        for compression in [CompressionType::Zlib, CompressionType::Zstd] {
            let encoder = Encoder::new(compression, check_level(compression, None).unwrap());
            let mut context = encoder.context().unwrap();
            let mut out = vec![0; 4096];
            if let Some(len) = context.encode(&noise, &mut out) {
                assert!(len < 4096);
            }
            assert!(context.encode(&[5; 4096], &mut out).unwrap() < 64);
            encoder.give_back(context);
        }
        assert!(check_level(CompressionType::Zlib, Some(13)).is_err());
    }
}
