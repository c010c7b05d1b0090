//! Tests of the outer compression writer and of reads by position, against zstd, gzip and zeekstd.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use imgtool_core::{
    BufferPool, Bytes, Consumer, CreateOptions, Driver, ErrorKind, Geometry, ImageSink, Input, Location,
    Memory, OpenOptions, Output, Part, Prepared, ReadAt, Result, SinkDevice, SinkPiece, WriteList,
};
use imgtool_storage::outer::{Compression, open_seekable};
use imgtool_storage::{CompressedSink, Framing, OpenInput, Opening, file, open::open};
use imgtool_testing::conformance::{self as laws, Content, Fill, Image, MemorySource, Order, Pipe};
use imgtool_testing::oracles::filter;
use imgtool_testing::require;
use imgtool_testing::toy::{Flaw, Toy};

const MIB: u64 = 1 << 20;
const FRAMINGS: [Framing; 4] = [
    Framing::SeekableZstd { level: 3 },
    Framing::SeekableZstd { level: -5 },
    Framing::Gzip { level: 6 },
    Framing::Gzip { level: 1 },
];

/// A sink for the plain bytes of a device, like raw into a pipe.
struct Flat([Output; 1]);

impl Consumer for Flat {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len: 256 << 10,
            max_zero_len: u64::MAX,
            ordered: false,
        }
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        let mut parts = Vec::new();
        let mut at = 0;
        let len = piece.len as usize;
        for run in piece.nonzero_runs(4096).into_iter().chain(std::iter::once(len..len)) {
            for (range, bytes) in [
                (at..run.start, Bytes::Zero((run.start - at) as u64)),
                (run.clone(), Bytes::Data(run.clone())),
            ] {
                if !range.is_empty() {
                    parts.push(Part {
                        guest: piece.start + range.start as u64..piece.start + range.end as u64,
                        bytes,
                    });
                }
            }
            at = run.end;
        }
        Ok(Prepared { parts, ..Prepared::new(piece) })
    }
}

impl ImageSink for Flat {
    fn outputs(&self) -> &[Output] {
        &self.0
    }

    fn append_only(&self) -> bool {
        true
    }

    fn place(&self, _prepared: &Prepared, _writes: &mut WriteList) -> Result<()> {
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

fn flat() -> Box<dyn ImageSink> {
    Box::new(Flat([CompressedSink::inner_output(&"flat".into())]))
}

fn image() -> Image {
    let content = Content::zero()
        .with(0..3 * MIB + 5, Fill::Text)
        .with(4 * MIB..6 * MIB, Fill::Random)
        .with(6 * MIB..9 * MIB, Fill::Checker(4096))
        .with(25 * MIB..31 * MIB + 77, Fill::Text);
    Image::disk("for packing", 33 * MIB + 77, content)
}

fn bytes_of(image: &Image) -> Vec<u8> {
    let (device, content) = &image.devices[0];
    let mut bytes = vec![0; device.size as usize];
    content.read(&mut bytes, 0);
    bytes
}

/// Opens a stream and removes its outer compression.
fn from_pipe(reader: impl Read + Send + 'static) -> OpenInput {
    let input = Input::from_reader(Location::Stdin, Box::new(reader)).unwrap();
    OpenInput::of(input).decompressed().unwrap()
}

fn pack(inner: Box<dyn ImageSink>, image: &Image, framing: Framing, output: Output, threads: usize) {
    let sink = CompressedSink::new(inner, output, framing).unwrap();
    laws::fill_sink(&MemorySource::new(image), &sink, threads).unwrap();
}

fn packed(image: &Image, framing: Framing, threads: usize) -> Vec<u8> {
    let pipe = Pipe::default();
    pack(flat(), image, framing, pipe.output(), threads);
    pipe.bytes()
}

#[test]
fn other_programs_read_packed_files() {
    require!("zstd", "gzip");
    for order in [Order::Random, Order::Stream] {
        let image = image().read_as(order);
        for framing in FRAMINGS {
            let bytes = packed(&image, framing, 2);
            let program = if matches!(framing, Framing::Gzip { .. }) { "gzip" } else { "zstd" };
            let plain = filter(program, &["-dc"], &bytes);
            assert!(plain == bytes_of(&image), "{program} -dc, {framing:?}, {order:?}");
            filter(program, &["-tq"], &bytes);
        }
    }
}

#[test]
fn bytes_do_not_depend_on_threads_or_target() {
    for framing in FRAMINGS {
        let image = image();
        let one = packed(&image, framing, 1);
        for threads in [2, 7] {
            assert!(packed(&image, framing, threads) == one, "{framing:?}, {threads} threads");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        pack(flat(), &image, framing, laws::new_file(&path), 7);
        assert!(std::fs::read(&path).unwrap() == one, "{framing:?}: file and pipe");
        assert!(one.len() < 14 << 20, "{framing:?}: {} bytes", one.len());
    }
}

#[test]
fn reads_a_packed_image_by_position_and_as_a_stream() {
    let options = CreateOptions::default();
    let toy = Toy(Flaw::NoEndNeeded);
    for image in laws::patterns().into_iter().chain([laws::several_devices(), image()]) {
        for framing in [FRAMINGS[0], FRAMINGS[2]] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            let inner = laws::create(
                &toy,
                CompressedSink::inner_output(&path.as_path().into()),
                &image.manifest(),
                &options,
            )
            .unwrap();
            pack(inner, &image, framing, laws::new_file(&path), 3);
            let input = open(&path.as_path().into(), Opening::ByContent, &Memory::default()).unwrap();
            let is_zstd = matches!(framing, Framing::SeekableZstd { .. });
            assert_eq!(input.compression, [if is_zstd { Compression::Zstd } else { Compression::Gzip }]);
            assert_eq!(input.input.is_stream(), !is_zstd);
            if is_zstd {
                let source = toy.open(input.input, &OpenOptions::default()).unwrap();
                laws::assert_content(&source, &image, 1);
            }
            // The same through a pipe, where seeking is not possible.
            let mut plain = Vec::new();
            let piped = from_pipe(std::fs::File::open(&path).unwrap());
            piped.input.into_stream().unwrap().read_to_end(&mut plain).unwrap();
            let expected = {
                let pipe = Pipe::default();
                laws::write(&toy, &options, &image, &pipe.output(), 1).unwrap();
                pipe.bytes()
            };
            assert!(plain == expected, "{image}, {framing:?}");
        }
    }
}

#[test]
fn long_zero_runs_compress_well() {
    let image = Image::disk("zeros", 2 << 30, Content::zero().with(1 << 30..(1 << 30) + 1, Fill::Byte(1)));
    let bytes = packed(&image, Framing::SeekableZstd { level: 3 }, 2);
    assert!(bytes.len() < 200_000, "{} bytes", bytes.len());
    let view = seekable(&bytes);
    assert_eq!(view.len(), 2 << 30);
    let mut around = [9; 3];
    view.read_exact_at(&mut around, (1 << 30) - 1).unwrap();
    assert_eq!(around, [0, 1, 0]);
}

/// Readers take a compressed file without content for the output of a command that failed.
#[test]
fn refuses_an_empty_image() {
    for framing in [FRAMINGS[0], FRAMINGS[2]] {
        let sink = CompressedSink::new(flat(), Pipe::default().output(), framing).unwrap();
        assert_eq!(sink.finish().unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn refuses_sinks_and_targets_that_cannot_be_packed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let options = CreateOptions::default();
    let inner = laws::create(
        &Toy(Flaw::None),
        CompressedSink::inner_output(&path.as_path().into()),
        &image().manifest(),
        &options,
    )
    .unwrap();
    assert!(CompressedSink::new(inner, laws::new_file(&path), FRAMINGS[0]).is_err(), "not append-only");
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let existing = file::existing(&path, file, false).unwrap();
    assert!(CompressedSink::new(flat(), existing, FRAMINGS[0]).is_err(), "an existing target");
}

/// Source in memory that counts the bytes read.
struct CountedMemory {
    bytes: Vec<u8>,
    read: AtomicU64,
}

impl ReadAt for CountedMemory {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let start = usize::try_from(position).unwrap();
        buf.copy_from_slice(self.bytes.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
}

fn counted(bytes: &[u8]) -> (Arc<CountedMemory>, Option<Arc<dyn ReadAt>>) {
    let memory = Arc::new(CountedMemory { bytes: bytes.to_vec(), read: AtomicU64::new(0) });
    let source: Arc<dyn ReadAt> = memory.clone();
    let view = open_seekable(Compression::Zstd, &source, &Memory::default());
    memory.read.store(0, Ordering::Relaxed);
    (memory, view)
}

fn seekable(bytes: &[u8]) -> Arc<dyn ReadAt> {
    counted(bytes).1.expect("the file has a seek table")
}

/// Checks random reads by four concurrent threads, and reads beyond the end.
fn assert_reads(view: &Arc<dyn ReadAt>, expected: &[u8]) {
    assert_eq!(view.len(), expected.len() as u64);
    std::thread::scope(|scope| {
        for reader in 0..4u64 {
            scope.spawn(move || {
                let mut seed = reader * 7919 + 1;
                for round in 0..150 {
                    seed =
                        seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let start = (seed >> 20) as usize % expected.len();
                    let len = ((seed >> 8) as usize % if round % 10 == 0 { 5_000_000 } else { 70_000 })
                        .clamp(1, expected.len() - start);
                    let mut found = vec![0xee; len];
                    view.read_exact_at(&mut found, start as u64).unwrap();
                    assert!(found == expected[start..start + len], "{len} bytes at {start}");
                }
            });
        }
    });
    let len = view.len();
    for (start, count) in [(len, 1), (len - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 9)] {
        let error = view.read_exact_at(&mut vec![0; count], start).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn reads_our_files_by_position() {
    let image = image();
    let view = seekable(&packed(&image, FRAMINGS[0], 2));
    assert_eq!(view.granule(), 4 << 20);
    assert_reads(&view, &bytes_of(&image));
}

#[test]
fn interoperates_with_zeekstd() {
    let expected = bytes_of(&image());
    for frame_len in [1, 100_000, 2_000_000] {
        let expected = &expected[..expected.len().min(frame_len * 300)];
        let mut bytes = Vec::new();
        let policy = zeekstd::FrameSizePolicy::Uncompressed(frame_len as u32);
        let options = zeekstd::EncodeOptions::new().frame_size_policy(policy).compression_level(1);
        let mut encoder = options.into_encoder(&mut bytes).unwrap();
        encoder.write_all(expected).unwrap();
        encoder.finish().unwrap();
        assert_reads(&seekable(&bytes), expected);
    }
    let ours = packed(&image(), FRAMINGS[0], 2);
    let mut decoder = zeekstd::Decoder::new(zeekstd::BytesWrapper::new(&ours)).unwrap();
    let mut plain = Vec::new();
    decoder.read_to_end(&mut plain).unwrap();
    assert!(plain == expected);
    decoder.set_offset(26_000_001).unwrap();
    let mut part = [0; 1000];
    decoder.read_exact(&mut part).unwrap();
    assert_eq!(part, expected[26_000_001..26_001_001]);
}

/// Encodes zstd frames and a seek table with checksums; the checksum of frame `corrupt` is wrong.
fn with_checksums(frames: &[&[u8]], corrupt: Option<usize>) -> Vec<u8> {
    let (mut file, mut entries) = (Vec::new(), Vec::new());
    for (number, plain) in frames.iter().enumerate() {
        let stored = zstd::bulk::compress(plain, 1).unwrap();
        let checksum = twox_hash::XxHash64::oneshot(0, plain) as u32 ^ u32::from(corrupt == Some(number));
        for value in [stored.len() as u32, plain.len() as u32, checksum] {
            entries.extend(value.to_le_bytes());
        }
        file.extend(stored);
    }
    file.extend(0x184d_2a5eu32.to_le_bytes());
    file.extend((entries.len() as u32 + 9).to_le_bytes());
    file.extend(entries);
    file.extend((frames.len() as u32).to_le_bytes());
    file.push(0x80);
    file.extend(0x8f92_eab1u32.to_le_bytes());
    file
}

#[test]
fn verifies_checksums_of_the_table_frame_by_frame() {
    let expected = bytes_of(&image())[..2_000_000].to_vec();
    let frames: Vec<&[u8]> = expected.chunks(300_000).collect();
    assert_reads(&seekable(&with_checksums(&frames, None)), &expected);
    let view = seekable(&with_checksums(&frames, Some(2)));
    let mut buf = [0; 10];
    for position in [0, 599_990, 900_000, 1_999_990] {
        view.read_exact_at(&mut buf, position).unwrap();
    }
    // Short reads at the start of a long frame, too: only a caller with a checksum of its own may skip this one.
    for position in [600_000, 899_000] {
        let error = view.read_exact_at(&mut buf, position).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("frame 2") && error.to_string().contains("checksum"), "{error}");
    }
    view.read_unverified_at(&mut buf, 600_000).unwrap();
    assert_eq!(buf, expected[600_000..600_010]);
}

#[test]
fn unverified_reads_decode_only_the_start_of_a_frame() {
    let image = Image::disk("text", 64 * MIB, Content::zero().with(0..64 * MIB, Fill::Random));
    let (memory, view) = counted(&packed(&image, FRAMINGS[0], 2));
    let view = view.unwrap();
    let expected = bytes_of(&image);
    for frame in 0..32 {
        let start = frame * 2 * MIB;
        let mut head = [0; 512];
        view.read_unverified_at(&mut head, start).unwrap();
        assert_eq!(head, expected[start as usize..][..512]);
    }
    let read = memory.read.load(Ordering::Relaxed);
    assert!(read <= 32 * 2048, "{read} bytes for 32 heads");
}

#[test]
fn decodes_a_frame_once_for_many_readers() {
    let image = Image::disk("text", 8 * MIB, Content::zero().with(0..8 * MIB, Fill::Text));
    let bytes = packed(&image, FRAMINGS[0], 2);
    let (memory, view) = counted(&bytes);
    let view = view.unwrap();
    std::thread::scope(|scope| {
        for _ in 0..7 {
            scope.spawn(|| {
                let mut part = vec![0; 100_000];
                for start in (0..8 * MIB - 100_000).step_by(99_999) {
                    view.read_exact_at(&mut part, start).unwrap();
                }
            });
        }
    });
    let read = memory.read.load(Ordering::Relaxed);
    assert!(read <= bytes.len() as u64, "{read} of {} bytes", bytes.len());
}

#[test]
fn parallel_readers_decode_ahead() {
    /// Storage that takes 20 ms for a read, and counts concurrent reads.
    struct SlowStorage {
        inner: Arc<dyn ReadAt>,
        current: AtomicU64,
        peak: AtomicU64,
    }
    impl ReadAt for SlowStorage {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            let current = self.current.fetch_add(1, Ordering::SeqCst) + 1;
            self.peak.fetch_max(current, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            self.current.fetch_sub(1, Ordering::SeqCst);
            self.inner.read_exact_at(buf, position)
        }
        fn len(&self) -> u64 {
            self.inner.len()
        }
    }
    let image = Image::disk("text", 64 * MIB, Content::zero().with(0..64 * MIB, Fill::Checker(8192)));
    let (memory, _) = counted(&packed(&image, FRAMINGS[1], 2));
    let slow = Arc::new(SlowStorage { inner: memory, current: AtomicU64::new(0), peak: AtomicU64::new(0) });
    let source: Arc<dyn ReadAt> = slow.clone();
    let view = open_seekable(Compression::Zstd, &source, &Memory::default()).unwrap();
    let expected = bytes_of(&image);
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut piece = vec![0; 256 << 10];
                loop {
                    let start = next.fetch_add(256 << 10, Ordering::Relaxed);
                    if start >= 64 * MIB {
                        break;
                    }
                    view.read_exact_at(&mut piece, start).unwrap();
                    assert!(piece == expected[start as usize..][..piece.len()]);
                }
            });
        }
    });
    // All threads need the same frame or the next. Without decoding ahead, they would read one frame at a
    // time.
    let peak = slow.peak.load(Ordering::SeqCst);
    assert!(peak >= 3, "{peak} frames at once");
}

#[test]
fn damage_affects_only_its_frame() {
    let image = Image::disk("text", 16 * MIB, Content::zero().with(0..16 * MIB, Fill::Text));
    let mut bytes = packed(&image, FRAMINGS[0], 2);
    let expected = bytes_of(&image);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    let view = seekable(&bytes);
    let mut failed = Vec::new();
    let mut chunk = vec![0; 65_536];
    for start in (0..expected.len()).step_by(chunk.len()) {
        match view.read_exact_at(&mut chunk, start as u64) {
            Ok(()) => assert!(chunk == expected[start..start + chunk.len()]),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
                failed.push(start as u64 / (2 * MIB));
            }
        }
    }
    failed.dedup();
    assert_eq!(failed.len(), 1, "one frame is lost, not {failed:?}");
}

#[test]
fn never_reads_wrong_bytes_through_a_damaged_table() {
    let image = Image::disk("text", 5 * MIB, Content::zero().with(0..5 * MIB, Fill::Text));
    let bytes = packed(&image, FRAMINGS[0], 2);
    let expected = bytes_of(&image);
    let table_len = 8 + 9 + 8 * 3;
    let (mut unused, mut errors) = (0, 0);
    for at in bytes.len() - table_len..bytes.len() {
        for change in [0xff, 1, 0x80] {
            let mut bad = bytes.clone();
            bad[at] ^= change;
            let Some(view) = counted(&bad).1 else {
                unused += 1;
                continue;
            };
            let mut plain = vec![0; usize::try_from(view.len()).unwrap().min(64 << 20)];
            match view.read_exact_at(&mut plain, 0) {
                Ok(()) => assert!(plain == expected, "byte {at} ^ {change:#x}"),
                Err(_) => errors += 1,
            }
        }
    }
    assert!(unused > 0 && errors > 0, "{unused} tables are not used, {errors} are errors");
    // Truncated, or with bytes after the table: the reader finds no table, and the stream decoder fails.
    for bad in [&bytes[..bytes.len() - 1], &bytes[..bytes.len() / 2], &[&bytes[..], b"x"].concat()] {
        assert!(counted(bad).1.is_none());
        let stream = from_pipe(io::Cursor::new(bad.to_vec()));
        assert!(stream.input.into_stream().unwrap().read_to_end(&mut Vec::new()).is_err());
    }
}
