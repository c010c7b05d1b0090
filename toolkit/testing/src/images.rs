//! Test images: a size and the runs that were written. Deterministic, without stored files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A disk's content.
#[derive(Debug, Clone)]
pub struct Image {
    /// Name of the case that it covers.
    pub name: &'static str,
    /// Size in bytes.
    pub size: u64,
    /// Written runs as offset and bytes, ascending and disjoint; everything else was never written.
    pub runs: Vec<(u64, Vec<u8>)>,
}

/// Returns pseudorandom bytes (xorshift64*). None of them is zero, so that a lost byte always shows.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes().map(|byte| byte | 1));
    }
    bytes.truncate(len);
    bytes
}

/// Returns bytes that compress: short words from a small alphabet.
pub fn prose(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = noise(seed, len);
    for byte in &mut bytes {
        *byte = b"etaoin shrdlu\n"[usize::from(*byte) % 14];
    }
    bytes
}

impl Image {
    /// Returns an image of `size` bytes to which nothing was written.
    pub fn hole(name: &'static str, size: u64) -> Self {
        Self { name, size, runs: Vec::new() }
    }

    /// Adds a run of bytes at offset `at`, after all earlier runs.
    #[must_use]
    pub fn with(mut self, at: u64, bytes: Vec<u8>) -> Self {
        let end = self.runs.last().map_or(0, |(start, bytes)| start + bytes.len() as u64);
        assert!(at >= end && at + bytes.len() as u64 <= self.size, "{}: a run at {at}", self.name);
        self.runs.push((at, bytes));
        self
    }

    /// Writes the image as a raw file; unwritten ranges stay holes.
    pub fn write_raw(&self, path: &Path) {
        let file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        file.set_len(self.size).expect("set_len");
        for (at, bytes) in &self.runs {
            file.write_all_at(bytes, *at).expect("write");
        }
    }

    /// Returns the content of a range; zeros beyond the end.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let end = at + len as u64;
        let mut out = vec![0; len];
        let first = self.runs.partition_point(|(start, bytes)| start + bytes.len() as u64 <= at);
        for (start, bytes) in &self.runs[first..] {
            if *start >= end {
                break;
            }
            let (from, to) = (at.max(*start), end.min(start + bytes.len() as u64));
            let (into, out_of) = ((from - at) as usize, (from - start) as usize);
            let count = (to - from) as usize;
            out[into..into + count].copy_from_slice(&bytes[out_of..out_of + count]);
        }
        out
    }
}

/// Sizes in bytes of a cluster and of a block, the units into which most formats divide images.
const CLUSTER: u64 = 65_536;
const BLOCK: u64 = 4096;

/// Returns images that formats tend to get wrong, of arbitrary sizes.
pub fn all() -> Vec<Image> {
    let mut images = vec![
        Image::hole("hole", 3 << 20),
        Image::hole("zeros-written", 1 << 20).with(0, vec![0; 1 << 20]),
        Image::hole("one-sector", 512).with(0, noise(1, 512)),
        Image::hole("last-byte", 9 << 20).with((9 << 20) - 1, vec![1]),
        Image::hole("last-sector-of-odd-cluster", 5 * CLUSTER + 512).with(5 * CLUSTER + 511, vec![1]),
        Image::hole("full", 2 << 20).with(0, noise(2, 2 << 20)),
        past_one_l2_table(),
        every_mask(),
        prose_and_holes(),
    ];
    images.extend(odd_sizes());
    images
}

/// Returns an empty image: valid as raw and qcow2, refused by formats that can't represent it.
pub fn nothing() -> Image {
    Image::hole("nothing", 0)
}

/// Returns images whose size is no multiple of a sector, a block or a cluster, with data up to the end.
fn odd_sizes() -> Vec<Image> {
    let sized = |name, size: u64| {
        let head = size.min(1000);
        let image = Image::hole(name, size).with(0, noise(size, head as usize));
        let tail = (size - head).min(700);
        image.with(size - tail, noise(size + 1, tail as usize))
    };
    vec![
        sized("1-byte", 1),
        sized("511-bytes", 511),
        sized("513-bytes", 513),
        sized("block-plus-1", BLOCK + 1),
        sized("cluster-minus-1", CLUSTER - 1),
        sized("cluster-plus-1", CLUSTER + 1),
        sized("sectors-not-blocks", 3 * BLOCK + 1536),
        sized("blocks-not-clusters", 7 * CLUSTER + 3 * BLOCK),
        sized("prime", 1_000_003),
        sized("mebibyte-plus-1", (1 << 20) + 1),
    ]
}

/// Returns an image with data near its end and on both sides of 512 MiB, the range that one qcow2 L2 table
/// maps.
fn past_one_l2_table() -> Image {
    let border = 512 << 20;
    Image::hole("past-one-l2-table", (700 << 20) + 512)
        .with(0, noise(10, 4096))
        .with(border - 5000, noise(11, 10_000))
        .with(border + CLUSTER * 3, prose(12, 3 * CLUSTER as usize))
        .with(650 << 20, noise(13, 100))
        .with(700 << 20, noise(14, 512))
}

/// Returns an image whose 100 clusters have different blocks written: each single block, each pair of
/// neighbours, stripes, none, all, arbitrary ones.
pub fn every_mask() -> Image {
    let mut masks: Vec<u16> = (0..16).map(|bit| 1 << bit).collect();
    masks.extend((0..15).map(|bit| 3 << bit));
    masks.extend([0, 0xffff, 0x5555, 0xaaaa, 0x00ff, 0xff00, 0x8001, 0x7ffe, 0, 0, 0xfffe, 0x7fff]);
    masks.extend((masks.len()..100).map(|i| (i as u16).wrapping_mul(40_503)));
    let size = masks.len() as u64 * CLUSTER - 2 * BLOCK - 512;
    let mut image = Image::hole("every-mask", size);
    for (cluster, mask) in masks.iter().enumerate() {
        for block in (0..16).filter(|block| mask >> block & 1 == 1) {
            let at = cluster as u64 * CLUSTER + block * BLOCK;
            let len = BLOCK.min(size.saturating_sub(at)) as usize;
            if len > 0 {
                // Some blocks contain a single nonzero byte, at their start or end.
                let bytes = match (cluster as u64 + block) % 5 {
                    0 => std::iter::once(7).chain(std::iter::repeat_n(0, len - 1)).collect(),
                    1 => std::iter::repeat_n(0, len - 1).chain(std::iter::once(9)).collect(),
                    _ => noise(at + 1, len),
                };
                image = image.with(at, bytes);
            }
        }
    }
    image
}

/// Returns an image with compressible data, incompressible data and holes side by side.
fn prose_and_holes() -> Image {
    let mut image = Image::hole("prose-and-holes", 24 << 20);
    for i in 0..12u64 {
        let at = (i << 21) + i * 3000;
        let len = 300_000 + i as usize * 10_000;
        image = image.with(at, if i % 3 == 0 { noise(i + 20, len) } else { prose(i + 20, len) });
    }
    image
}
