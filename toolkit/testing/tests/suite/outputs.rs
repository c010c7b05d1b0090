//! The contract of images of several outputs, tested with a toy: a descriptor and a flat file beside it.

use std::path::Path;

use imgtool_core::{
    BufferPool, Bytes, Consumer, CreateOptions, Driver, ErrorKind, Geometry, ImageSink, ImageWriter, InPlace,
    Input, Manifest, Memory, OpenOptions, Output, OutputFactory, OutputId, Prepared, Result, SinkDevice,
    SinkPiece, WriteList,
};
use imgtool_core::{CancelToken, Capabilities, Confidence, Error, ImageSource, Lane, NoProgress, Sharing};
use imgtool_engine::digest::ContentDigest;
use imgtool_engine::pipeline::{self, Job, Route, Target};
use imgtool_testing::conformance::{
    self as laws, Content, FileOutputs, Fill, Image, MemorySource, Order, SingleOutput,
};

/// Driver of a toy format: a descriptor with a line for each used mebibyte, and the bytes in `NAME-flat.bin`.
struct SplitDriver;

impl Driver for SplitDriver {
    fn name(&self) -> &'static str {
        "split"
    }

    fn description(&self) -> &'static str {
        "a descriptor and a flat file, for tests"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["split"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { write: true, in_place: InPlace::Never, ..Capabilities::default() }
    }

    fn probe(&self, _head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        None
    }

    fn open(&self, _input: Input, _options: &OpenOptions) -> Result<std::sync::Arc<dyn ImageSource>> {
        Err(Error::unsupported("split images are written only"))
    }

    fn writer(&self, _options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(SplitWriter))
    }
}

struct SplitWriter;

fn flat_name(main: &str) -> String {
    format!("{main}-flat.bin")
}

impl ImageWriter for SplitWriter {
    fn companions(&self, main: &str, _manifest: &Manifest) -> Vec<String> {
        vec![flat_name(main)]
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let size = manifest.single("split")?.size;
        let main = outputs.main()?;
        let name = main.location().file_name().ok_or_else(|| Error::usage("a stream has no name"))?;
        let flat = outputs.beside(&flat_name(&name))?;
        Ok(Box::new(SplitSink { outputs: [main, flat], size }))
    }
}

struct SplitSink {
    outputs: [Output; 2],
    size: u64,
}

const DESCRIPTOR: OutputId = OutputId::MAIN;
const FLAT: OutputId = OutputId(1);
/// Length in bytes of a line of the descriptor, which has a line for each mebibyte of the disk.
const LINE_LEN: u64 = 32;
const UNIT: u64 = 1 << 20;

impl Consumer for SplitSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: UNIT,
            granule_required: true,
            piece_len: UNIT,
            max_zero_len: u64::MAX,
            ordered: false,
        }
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        let runs = piece.nonzero_runs(4096);
        Ok(Prepared::sparse(piece, runs, false))
    }
}

impl ImageSink for SplitSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        self.outputs[1].set_len(self.size)?;
        Ok(format!("{:<31}\n", "split 1").into_bytes())
    }

    fn sharing(&self, _device: SinkDevice) -> Sharing {
        Sharing::Parts(FLAT)
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        // Writes to both outputs in turn; the order within each output must be kept.
        for part in &prepared.parts {
            writes.push(FLAT, part.guest.start, part.bytes.clone());
            let unit = part.guest.start / UNIT;
            let line = format!("{:<31}\n", format!("unit {unit} is used"));
            writes.push(DESCRIPTOR, (unit + 1) * LINE_LEN, Bytes::Owned(line.into_bytes()));
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let end = (self.size.div_ceil(UNIT) + 1) * LINE_LEN;
        self.outputs[0].write_at(b"end\n", end)
    }
}

fn image() -> Image {
    let content = Content::zero()
        .with(100..300_000, Fill::Text)
        .with(3 * UNIT..5 * UNIT, Fill::Checker(65_536))
        .with(9 * UNIT..9 * UNIT + 7, Fill::Random);
    Image::disk("a disk", 9 * UNIT + 7, content)
}

fn expected_flat() -> Vec<u8> {
    let (device, content) = &image().devices[0];
    let mut bytes = vec![0; device.size as usize];
    content.read(&mut bytes, 0);
    bytes
}

/// Writes the image with the pipeline and returns the digest of its content.
fn write_split(order: Order, threads: usize, path: &Path) -> u128 {
    let image = image().read_as(order);
    let mut outputs = FileOutputs::new(path);
    let writer = SplitDriver.writer(&CreateOptions::default()).unwrap();
    let sink = writer.create(&mut outputs, &image.manifest()).unwrap();
    assert_eq!(sink.outputs().len(), 2);
    sink.outputs()[0].write_at(&sink.begin().unwrap(), 0).unwrap();
    let source = MemorySource::new(&image);
    let digest = ContentDigest::new();
    let from = source.info().devices[0].id;
    let job = Job {
        targets: vec![Target::Sink(&*sink)],
        routes: vec![Route { from, target: 0, to: SinkDevice(0), lane: Lane(0) }],
        taps: vec![&digest],
        threads,
        progress: &NoProgress,
        cancel: CancelToken::new(),
        memory: Memory::default(),
    };
    let totals = pipeline::copy(&source, &job).unwrap();
    assert_eq!(totals.guest_bytes, 9 * UNIT + 7);
    sink.finish().unwrap();
    digest.of(Lane(0))
}

#[test]
fn both_outputs_are_correct_in_any_order_with_any_threads() {
    let mut first: Option<(Vec<u8>, u128)> = None;
    for order in [Order::Random, Order::Stream, Order::Shuffled] {
        for threads in [1, 2, 7] {
            let directory = laws::scratch();
            let path = directory.path().join("disk.split");
            let digest = write_split(order, threads, &path);
            let flat = std::fs::read(directory.path().join("disk.split-flat.bin")).unwrap();
            assert!(flat == expected_flat(), "{order:?}, {threads} threads");
            let found = (std::fs::read(&path).unwrap(), digest);
            let text = String::from_utf8_lossy(&found.0).replace('\0', "");
            let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
            let used = ["unit 0", "unit 3", "unit 4", "unit 9"].map(|unit| format!("{unit} is used"));
            assert_eq!(lines[0], "split 1");
            assert_eq!(lines[1..5], used);
            assert_eq!(lines[5..], ["end"]);
            assert_eq!(*first.get_or_insert_with(|| found.clone()), found, "{order:?}, {threads} threads");
        }
    }
}

#[test]
fn the_writer_announces_its_outputs() {
    let directory = laws::scratch();
    let path = laws::make(&SplitDriver, &CreateOptions::default(), &image(), directory.path());
    let flat = path.with_file_name(flat_name(&path.file_name().unwrap().to_string_lossy()));
    assert!(std::fs::read(flat).unwrap() == expected_flat());
}

#[test]
fn refuses_a_single_output_and_names_outside_the_directory() {
    let directory = laws::scratch();
    let path = directory.path().join("x.split");
    let writer = SplitDriver.writer(&CreateOptions::default()).unwrap();
    let created = writer.create(&mut SingleOutput(laws::new_file(&path)), &image().manifest());
    assert_eq!(created.err().unwrap().kind(), ErrorKind::Refused);
    let mut outputs = FileOutputs::new(&directory.path().join("y.split"));
    for name in ["../y", "/y", "a/b", "..", "", "x.split"] {
        assert_eq!(outputs.beside(name).err().unwrap().kind(), ErrorKind::Refused, "{name}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// A sink that writes to an output that it does not have.
struct Stray(SplitSink);

impl Consumer for Stray {
    fn geometry(&self, device: SinkDevice) -> Geometry {
        self.0.geometry(device)
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        self.0.prepare(piece, pool)
    }
}

impl ImageSink for Stray {
    fn outputs(&self) -> &[Output] {
        self.0.outputs()
    }

    fn place(&self, _prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        writes.push(OutputId(2), 0, Bytes::Zero(1));
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn write_to_a_missing_output_fails_the_copy() {
    let directory = laws::scratch();
    let outputs = ["a", "b"].map(|name| laws::new_file(&directory.path().join(name)));
    let stray = Stray(SplitSink { outputs, size: 9 * UNIT + 7 });
    for threads in [1, 7] {
        let error = laws::fill_sink(&MemorySource::new(&image()), &stray, threads).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    }
}
