//! Laws about whole images.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use imgtool_core::input::PROBE_LEN;
use imgtool_core::{
    CancelToken, Confidence, CreateOptions, DeviceId, Disk, Driver, Error, ErrorKind, ImageSource, InPlace,
    Input, Location, OpenOptions,
};
use imgtool_engine::pipeline::Target;
use imgtool_storage::{file, os};

use super::compare::{compare, compare_read, odd_range};
use super::harness::{
    Pipe, copy, create, fill_sink, input, is_refusal, make, make_bytes, make_with, new_file, open, open_with,
    scratch, write,
};
use super::image::{Content, Fill, Image, Order, far_apart, mix, patterns, several_devices};
use super::memory::MemorySource;
use super::truncated_is_an_error;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Runs every law that the capabilities of a driver imply. The driver must read and write; for a driver that
/// only reads, see [`super::read_only()`].
///
/// # Panics
/// If the driver breaks a law.
pub fn all(driver: &dyn Driver, options: &CreateOptions) {
    let can = driver.capabilities();
    assert!(can.read && can.write, "{}: does not read and write", driver.name());
    for image in patterns() {
        round_trip(driver, options, &image);
        sequential_equals_random(driver, options, &image);
    }
    let several = several_devices();
    if can.max_devices() as usize >= several.devices.len() {
        round_trip(driver, options, &several);
        same_bytes_for_any_thread_count(driver, options, &several);
        sequential_equals_random(driver, options, &several);
    } else {
        too_many_devices_are_refused(driver, options);
    }
    sizes(driver, options);
    same_bytes_for_any_thread_count(driver, options, &far_apart());
    sparse_stays_sparse(driver, options);
    parallel_reads(driver, options);
    reads_stay_within_the_device(driver, options);
    cancelled_copies_end(driver, options);
    cancelled_opens_and_checks_end(driver, options);
    probe_knows_its_own(driver, options);
    truncated_is_an_error(driver, options, &mixed_image());
    existing_target_with_old_data(driver, options, &mixed_image());
    if can.stream_write && driver.writer(options).expect("valid options").writes_stream() {
        stream_output_equals_file_output(driver, options, &mixed_image());
    }
    if can.stream_read {
        stream_read_equals_file_read(driver, options, &mixed_image());
        stream_read_equals_file_read(driver, options, &several_within(driver));
    }
    if can.open_ended {
        open_ended_sources(driver, options);
    }
    if can.check {
        check_finds_nothing(driver, options);
    }
}

/// Returns a small image with all kinds of content, for laws that write it often.
pub fn mixed_image() -> Image {
    let content = Content::zero()
        .with(0..200_000, Fill::Random)
        .with(300_000..420_000, Fill::Text)
        .with(MIB..2 * MIB, Fill::Checker(4 * KIB))
        .with(3 * MIB - 70_000..3 * MIB, Fill::Random);
    Image::disk("a bit of everything", 3 * MIB, content)
}

/// Returns an image of several devices if the format can store them, or else of one.
fn several_within(driver: &dyn Driver) -> Image {
    let several = several_devices();
    if driver.capabilities().max_devices() as usize >= several.devices.len() { several } else { far_apart() }
}

/// An image read back equals the image written, in every byte, in its extents, and in reads at arbitrary
/// positions.
///
/// # Panics
/// If the driver breaks the law.
pub fn round_trip(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let directory = scratch();
    let path = make(driver, options, image, directory.path());
    expect_content(driver, &path, image, "round trip");
    let source = open(driver, &path).expect("opened before");
    if driver.capabilities().attachments() {
        assert_eq!(source.info().attachments, image.attachments, "{}: attachments of {image}", driver.name());
    }
    assert_eq!(source.info().format, driver.name(), "the format in its info is the driver's name");
}

/// Asserts that the file at `path` contains `image`.
fn expect_content(driver: &dyn Driver, path: &Path, image: &Image, law: &str) {
    let source = open(driver, path)
        .unwrap_or_else(|e| panic!("{}: {law}: {image} can't be opened: {e:#}", driver.name()));
    expect_source(driver, &source, image, law);
}

/// Asserts that `source` contains `image`.
pub(super) fn expect_source(driver: &dyn Driver, source: &Arc<dyn ImageSource>, image: &Image, law: &str) {
    if let Err(fault) = compare(source, image, driver.capabilities().size_multiple) {
        panic!("{}: {law}: {image}: {fault}", driver.name());
    }
}

/// One, two and seven threads write identical files, for any order of the source.
///
/// # Panics
/// If the driver breaks the law.
pub fn same_bytes_for_any_thread_count(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    for order in [Order::Random, Order::Stream, Order::Shuffled] {
        let image = image.read_as(order);
        let directory = scratch();
        let one = make_with(driver, options, &image, directory.path(), 1);
        for threads in [2, 7, 7] {
            let many = make_with(driver, options, &image, directory.path(), threads);
            if let Some(place) = first_difference(&one, &many) {
                panic!(
                    "{}: {image}: {threads} threads write other bytes than one, from {place}",
                    driver.name()
                );
            }
            std::fs::remove_file(many).expect("remove the output");
        }
    }
}

/// Returns the position of the first difference between two files. Skips ranges that are holes in both.
fn first_difference(left: &Path, right: &Path) -> Option<u64> {
    let open = |path: &Path| input(path).and_then(Input::into_random).expect("open the output");
    let (left, right) = (open(left), open(right));
    if left.len() != right.len() {
        return Some(left.len().min(right.len()));
    }
    let mut at = 0;
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while at < left.len() {
        let len = a.len().min((left.len() - at) as usize);
        let runs = [left.run(at), right.run(at)].map(|run| run.expect("query holes"));
        let holes_end = runs.iter().map(|run| run.end).min().unwrap_or(at);
        if runs.iter().all(|run| !run.is_data) && holes_end > at {
            at = holes_end;
            continue;
        }
        left.read_exact_at(&mut a[..len], at).expect("read the output");
        right.read_exact_at(&mut b[..len], at).expect("read the output");
        if let Some(index) = a[..len].iter().zip(&b[..len]).position(|(a, b)| a != b) {
            return Some(at + index as u64);
        }
        at += len as u64;
    }
    None
}

/// An image written from a stream, in order or shuffled, has the same content as one written from a
/// source read by position.
///
/// # Panics
/// If the driver breaks the law.
pub fn sequential_equals_random(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    for order in [Order::Stream, Order::Shuffled] {
        let directory = scratch();
        let image = image.read_as(order);
        let path = directory.path().join("image");
        match write(driver, options, &image, &new_file(&path), 2) {
            Ok(()) => expect_content(driver, &path, &image, "sequential equals random"),
            // A format may refuse pieces out of order.
            Err(error) if order == Order::Shuffled && is_refusal(&error) => {}
            Err(error) => panic!("{}: {image} can't be written: {error:#}", driver.name()),
        }
    }
}

/// A device keeps any size, rounded up to the format's multiple. The driver may refuse size 0.
///
/// # Panics
/// If the driver breaks the law.
pub fn sizes(driver: &dyn Driver, options: &CreateOptions) {
    let sizes = [
        0,
        1,
        511,
        512,
        513,
        4095,
        4096,
        4097,
        65_535,
        65_536,
        65_537,
        MIB - 1,
        MIB + 1,
        2 * MIB + 512,
        3 * MIB + 4097,
    ];
    for size in sizes {
        let contents = [
            Content::zero(),
            Content::zero().with(0..size, Fill::Random),
            Content::zero().with(size / 2..size, Fill::Text),
        ];
        for (content, order) in contents.into_iter().zip([Order::Random, Order::Random, Order::Stream]) {
            let image = Image::disk(format!("{size} bytes"), size, content).read_as(order);
            let directory = scratch();
            let path = directory.path().join("image");
            match write(driver, options, &image, &new_file(&path), 2) {
                Ok(()) => expect_content(driver, &path, &image, "sizes"),
                Err(error) if size == 0 && is_refusal(&error) => {}
                Err(error) => panic!("{}: {image} can't be written: {error:#}", driver.name()),
            }
        }
    }
}

/// A device of 544 MiB with little data makes a small file whose extents report little data.
///
/// # Panics
/// If the driver breaks the law.
pub fn sparse_stays_sparse(driver: &dyn Driver, options: &CreateOptions) {
    let image = far_apart();
    let (device, content) = &image.devices[0];
    for order in [Order::Random, Order::Stream] {
        let directory = scratch();
        let path = make(driver, options, &image.read_as(order), directory.path());
        let allocated = os::allocated_len(&std::fs::metadata(&path).expect("stat the file"));
        // Our limit: 4 MiB for headers, tables and a log.
        let allowed = content.data_len(64 * KIB) + 4 * MIB;
        assert!(
            allocated <= allowed,
            "{}: {image} read as {order:?}: the file occupies {allocated} bytes, more than {allowed}",
            driver.name()
        );
        let source = open(driver, &path).expect("open what was written");
        let Some(disk) = first_disk(&source) else { continue };
        let unit = source.info().cluster_size.unwrap_or(64 * KIB).max(64 * KIB);
        let (mut at, mut data) = (0, 0);
        while at < device.size {
            for extent in disk.extents(at..device.size).expect("extents") {
                at = extent.end();
                data += if extent.is_data() { extent.len } else { 0 };
            }
        }
        let allowed = content.data_len(unit) + 4 * MIB;
        assert!(
            data <= allowed,
            "{}: {image}: extents claim {data} bytes of data, more than {allowed}",
            driver.name()
        );
    }
}

/// Returns the first disk of an image; `None` if the image is read in one pass.
fn first_disk(source: &Arc<dyn ImageSource>) -> Option<Disk> {
    let device = source.info().devices.first()?.id;
    let is_random = !source.access().is_stream();
    is_random.then(|| Disk::new(Arc::clone(source), device).expect("the image has the device"))
}

/// Four threads that read odd ranges of one source at once get the right bytes.
///
/// # Panics
/// If the driver breaks the law.
pub fn parallel_reads(driver: &dyn Driver, options: &CreateOptions) {
    let content =
        Content::zero().with(5000..3 * MIB, Fill::Checker(64 * KIB)).with(4 * MIB..5 * MIB, Fill::Text);
    let image = Image::disk("for four readers", 6 * MIB, content);
    let directory = scratch();
    let path = make(driver, options, &image, directory.path());
    let source = open(driver, &path).expect("open what was written");
    read_in_parallel(driver, &source, &image);
}

/// Reads the first disk of an image with four threads, and compares it.
pub(super) fn read_in_parallel(driver: &dyn Driver, source: &Arc<dyn ImageSource>, image: &Image) {
    let Some(disk) = first_disk(source) else { return };
    let content = &image.devices[0].1;
    std::thread::scope(|scope| {
        for reader in 0..4u64 {
            let disk = disk.clone();
            scope.spawn(move || {
                for round in 0..300 {
                    let Some((range, len)) = odd_range(disk.size(), round + reader * 150) else { return };
                    if let Err(fault) = compare_read(&disk, content, range.start, &mut vec![0; len]) {
                        panic!("{}: parallel reads: {fault}", driver.name());
                    }
                    if round % 16 == 0 {
                        disk.extents(range.start..disk.size()).expect("extents while others read");
                    }
                }
            });
        }
    });
}

/// Reads and extents beyond the end of a disk are refused, and so is a device that does not exist.
///
/// # Panics
/// If the driver breaks the law.
pub fn reads_stay_within_the_device(driver: &dyn Driver, options: &CreateOptions) {
    let directory = scratch();
    let path = make(driver, options, &mixed_image(), directory.path());
    let source = open(driver, &path).expect("open what was written");
    expect_bounds(driver, &source);
}

/// Asserts that the first disk of an image refuses ranges beyond its end.
pub(super) fn expect_bounds(driver: &dyn Driver, source: &Arc<dyn ImageSource>) {
    let Some(disk) = first_disk(source) else { return };
    let size = disk.size();
    let beyond = [(size, 1), (size.saturating_sub(1), 2), (u64::MAX, 1), (u64::MAX - 4096, 4097)];
    for (start, len) in beyond {
        let refusals = [
            disk.read_at(&mut vec![0; len], start).err(),
            disk.extents(start..start.saturating_add(len as u64)).err().filter(|_| start < u64::MAX),
        ];
        let [Some(read), extents] = refusals else {
            panic!("{}: read {len} bytes at {start} of a disk of {size}", driver.name());
        };
        assert_eq!(read.kind(), ErrorKind::OutOfBounds, "{}: {read}", driver.name());
        assert!(
            start == u64::MAX || extents.is_some_and(|error| error.kind() == ErrorKind::OutOfBounds),
            "{}: extents of {len} bytes at {start} of a disk of {size}",
            driver.name()
        );
    }
    assert!(disk.read_at(&mut [], size).is_ok(), "{}: an empty read at the end", driver.name());
    let missing = Disk::new(Arc::clone(source), DeviceId(250_000)).err();
    assert_eq!(
        missing.map(|error| error.kind()),
        Some(ErrorKind::Usage),
        "{}: no such device",
        driver.name()
    );
}

/// The driver's probe recognises the driver's own images.
///
/// # Panics
/// If the driver breaks the law.
pub fn probe_knows_its_own(driver: &dyn Driver, options: &CreateOptions) {
    let directory = scratch();
    let path = make(driver, options, &mixed_image(), directory.path());
    expect_probed(driver, &input(&path).expect("open what was written"));
    expect_not_probed(driver);
}

/// Asserts that the driver recognises an image.
pub(super) fn expect_probed(driver: &dyn Driver, input: &Input) {
    let by_head = driver.probe(&input.head().expect("first bytes"), input.len()).is_some();
    let by_end = driver.probe_end(input.end().expect("last bytes").as_deref());
    assert!(by_head || by_end, "{} does not recognise its own image", driver.name());
}

/// Asserts that a driver does not claim foreign content, which would shadow the drivers after it. A driver
/// whose format allows any content may claim it as a fallback.
pub(super) fn expect_not_probed(driver: &dyn Driver) {
    let noise: Vec<u8> = (0..4096u64).map(|at| super::image::mix(at) as u8).collect();
    for head in [vec![], vec![0; 4096], vec![0xff; 4096], noise] {
        let found = driver.probe(&head, Some(1 << 20));
        let is_fallback = found == Some(Confidence::Fallback) && driver.capabilities().verbatim;
        assert!(found.is_none() || is_fallback, "{} claims content that is not its own", driver.name());
    }
}

/// The driver refuses to create an image with more devices than the format can store, and writes nothing.
///
/// # Panics
/// If the driver breaks the law.
pub fn too_many_devices_are_refused(driver: &dyn Driver, options: &CreateOptions) {
    let directory = scratch();
    let path = directory.path().join("image");
    let created = create(driver, new_file(&path), &several_devices().manifest(), options);
    let Err(error) = created else { panic!("{} accepts three devices", driver.name()) };
    assert!(is_refusal(&error), "{}: not a refusal: {error}", driver.name());
    let len = std::fs::metadata(&path).expect("stat the file").len();
    assert_eq!(len, 0, "{}: wrote to a refused image", driver.name());
}

/// An existing target full of old data contains the image afterwards, including its zeros, and keeps its
/// length. A driver that never writes in place may refuse the target instead.
///
/// # Panics
/// If the driver breaks the law.
pub fn existing_target_with_old_data(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let directory = scratch();
    let fresh = std::fs::metadata(make(driver, options, image, directory.path())).expect("metadata").len();
    // A format without a header takes the file's length as the device's size, so the two must match.
    let len = if fresh == image.devices[0].0.size { fresh } else { fresh + 64 * MIB };
    for order in [Order::Random, Order::Stream] {
        let image = image.read_as(order);
        let path = directory.path().join(format!("old-{order:?}"));
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
        fill_with_old_data(&file, len);
        let output = file::existing(&path, file, false).expect("find the length");
        let never = driver.capabilities().in_place == InPlace::Never;
        let sink = match create(driver, output, &image.manifest(), options) {
            Ok(sink) => sink,
            Err(error) if never && is_refusal(&error) => return,
            Err(error) => panic!("{}: {image} into an existing target: {error:#}", driver.name()),
        };
        if let Err(error) = fill_sink(&MemorySource::new(&image), &*sink, 2) {
            panic!("{}: {image} into an existing target: {error:#}", driver.name());
        }
        drop(sink);
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), len, "the target must keep its length");
        let options = OpenOptions { ignore_trailing: true, ..OpenOptions::default() };
        let source = open_with(driver, &path, &options).unwrap_or_else(|e| {
            panic!("{}: {image} in an existing target can't be opened: {e:#}", driver.name())
        });
        expect_source(driver, &source, &image, "existing target");
    }
}

/// Fills a file with `len` bytes that no image contains.
fn fill_with_old_data(file: &File, len: u64) {
    let old = vec![0xaa; 1 << 20];
    let mut at = 0;
    while at < len {
        let part = &old[..old.len().min((len - at) as usize)];
        at +=
            os::write_vectored_at(file, &[std::io::IoSlice::new(part)], at).expect("fill the target") as u64;
    }
}

/// An image written to a pipe is identical to one written to a file.
///
/// # Panics
/// If the driver breaks the law.
pub fn stream_output_equals_file_output(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    for order in [Order::Random, Order::Stream] {
        let image = image.read_as(order);
        let file = make_bytes(driver, options, &image);
        for threads in [1, 7] {
            let pipe = Pipe::default();
            if let Err(error) = write(driver, options, &image, &pipe.output(), threads) {
                panic!("{}: {image} into a pipe: {error:#}", driver.name());
            }
            let piped = pipe.bytes();
            let same = piped.iter().zip(&file).position(|(a, b)| a != b);
            assert!(
                piped == file,
                "{}: {image}: a pipe gets {} bytes, a file {}, first difference at {same:?}",
                driver.name(),
                piped.len(),
                file.len()
            );
        }
    }
}

/// An image read from a pipe, in odd portions, has the same content as one read from a file.
///
/// # Panics
/// If the driver breaks the law.
pub fn stream_read_equals_file_read(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let bytes = make_bytes(driver, options, image);
    if driver.reads_stream(&bytes[..bytes.len().min(PROBE_LEN)]) {
        expect_stream(driver, &bytes, image, &OpenOptions::default());
    }
}

/// Asserts that an image read from a pipe, in odd portions, contains `image`.
pub(super) fn expect_stream(driver: &dyn Driver, bytes: &[u8], image: &Image, options: &OpenOptions) {
    let reader = OddPortions { bytes: Cursor::new(bytes.to_vec()), round: 0 };
    let input = Input::from_reader(Location::Stdin, Box::new(reader)).expect("first bytes");
    let source = driver
        .open(input, options)
        .unwrap_or_else(|e| panic!("{}: {image} from a pipe can't be opened: {e:#}", driver.name()));
    expect_source(driver, &source, image, "read from a pipe");
}

/// A reader that returns odd portions, like a pipe.
struct OddPortions {
    bytes: Cursor<Vec<u8>>,
    round: u64,
}

impl Read for OddPortions {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.round += 1;
        let max_len = 1 + (mix(self.round) % 70_000) as usize;
        let len = buf.len().min(max_len);
        self.bytes.read(&mut buf[..len])
    }
}

/// An image written from a stream of unknown size has the size found at the stream's end.
///
/// # Panics
/// If the driver breaks the law.
pub fn open_ended_sources(driver: &dyn Driver, options: &CreateOptions) {
    for size in [1, 512, 65_536, 100_000, 3 * MIB, 3 * MIB + 4097] {
        for content in [
            Content::zero().with(0..size, Fill::Random),
            Content::zero().with(0..size.min(70_000), Fill::Text),
        ] {
            let image =
                Image::disk(format!("open-ended, {size} bytes"), size, content).read_as(Order::Stream);
            let directory = scratch();
            let path = directory.path().join("image");
            let source = MemorySource::new(&image).open_ended();
            let mut manifest = image.manifest();
            manifest.devices = source.info().devices.clone();
            let written = create(driver, new_file(&path), &manifest, options)
                .and_then(|sink| fill_sink(&source, &*sink, 2));
            if let Err(error) = written {
                panic!("{}: {image} can't be written: {error:#}", driver.name());
            }
            expect_content(driver, &path, &image, "open-ended source");
        }
    }
}

/// The driver's check of its own images reports no findings.
///
/// # Panics
/// If the driver breaks the law.
pub fn check_finds_nothing(driver: &dyn Driver, options: &CreateOptions) {
    for image in [mixed_image(), far_apart(), Image::disk("all zero", 5 * MIB, Content::zero())] {
        for order in [Order::Random, Order::Stream, Order::Shuffled] {
            let image = image.read_as(order);
            let directory = scratch();
            let path = directory.path().join("image");
            match write(driver, options, &image, &new_file(&path), 2) {
                Ok(()) => {}
                Err(error) if order == Order::Shuffled && is_refusal(&error) => continue,
                Err(error) => panic!("{}: {image} can't be written: {error:#}", driver.name()),
            }
            let input = input(&path).expect("open what was written");
            expect_clean(driver, input, &image, &OpenOptions::default());
        }
    }
}

/// Asserts that the driver's check of an image reports no findings.
pub(super) fn expect_clean(driver: &dyn Driver, input: Input, image: &Image, options: &OpenOptions) {
    let report = match driver.check(input, options) {
        Ok(report) => report,
        Err(error) => panic!("{}: {image} can't be checked: {error:#}", driver.name()),
    };
    let clean = report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0;
    assert!(clean, "{}: {image}: {:?}", driver.name(), report.findings);
}

/// After the user cancels, opening, checking or measuring an image ends with [`ErrorKind::Cancelled`], never
/// with a verdict on unread bytes.
///
/// # Panics
/// If the driver breaks the law.
pub fn cancelled_opens_and_checks_end(driver: &dyn Driver, options: &CreateOptions) {
    let directory = scratch();
    let path = make(driver, options, &mixed_image(), directory.path());
    let cancel = CancelToken::new();
    let input = || input(&path).expect("open what was written").cancelled_by(cancel.clone());
    let opened = driver.open(input(), &OpenOptions::default()).expect("open");
    cancel.cancel();
    expect_cancelled(driver, &input, &OpenOptions::default());
    let writer = driver.writer(options).expect("written with these options");
    if let Err(error) = writer.measure(&*opened) {
        let allowed = error.kind() == ErrorKind::Cancelled || is_refusal(&error);
        assert!(allowed, "{}: measuring: {error}", driver.name());
    }
}

/// Asserts that the driver gives no verdict on an input that the user has cancelled.
pub(super) fn expect_cancelled(driver: &dyn Driver, input: &dyn Fn() -> Input, options: &OpenOptions) {
    let is_cancelled = |error: &Error| error.kind() == ErrorKind::Cancelled;
    // A format without a header has nothing to read, and opens successfully.
    if let Err(error) = driver.open(input(), options) {
        assert!(is_cancelled(&error), "{}: opening: {error}", driver.name());
    }
    if driver.capabilities().check {
        match driver.check(input(), options) {
            Ok(report) => panic!("{}: a verdict on unread bytes: {report:?}", driver.name()),
            Err(error) => assert!(is_cancelled(&error), "{}: checking: {error}", driver.name()),
        }
    }
}

/// A cancelled conversion ends with [`ErrorKind::Cancelled`], for any number of threads.
///
/// # Panics
/// If the driver breaks the law.
pub fn cancelled_copies_end(driver: &dyn Driver, options: &CreateOptions) {
    let image = mixed_image();
    for threads in [1, 7] {
        let directory = scratch();
        let output = new_file(&directory.path().join("image"));
        let sink = create(driver, output, &image.manifest(), options).expect("create");
        let cancel = CancelToken::new();
        cancel.cancel();
        let source = MemorySource::new(&image);
        let error = copy(&source, Target::Sink(&*sink), threads, cancel).expect_err("the copy was cancelled");
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{}: {error}", driver.name());
    }
}
