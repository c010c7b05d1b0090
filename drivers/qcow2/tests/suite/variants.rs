//! All combinations of variants: images of QEMU read by this driver, its images read by QEMU and imago.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use imgtool_core::{CreateOptions, Driver};
use imgtool_qcow2::Qcow2Driver;
use imgtool_raw::RawDriver;
use imgtool_testing::conformance::{self as laws, Content, Fill, Image};
use imgtool_testing::oracles::{assert_clean_qcow2, run_in, run_json_in};
use imgtool_testing::require;

use crate::tools::{convert, open_options, options, write};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Number of worker threads of a test. They mostly wait for QEMU's programs.
const WORKERS: usize = 4;

/// Variant of the format.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    pub compat: &'static str,
    pub cluster_size: u64,
    pub refcount_bits: u32,
    pub compression: Option<&'static str>,
    pub extended_l2: bool,
    pub lazy_refcounts: bool,
    pub preallocation: &'static str,
    pub backing: bool,
    pub data_file: bool,
    pub data_file_raw: bool,
}

impl Variant {
    /// Returns all combinations of version, cluster size, refcount width and extended L2.
    pub fn shapes() -> Vec<Self> {
        let mut shapes = Vec::new();
        for cluster_size in [512, 4 * KIB, 64 * KIB, 2 * MIB] {
            for (compat, refcount_bits) in
                [1, 2, 4, 8, 16, 32, 64].map(|bits| ("1.1", bits)).into_iter().chain([("0.10", 16)])
            {
                for extended_l2 in [false, true] {
                    if extended_l2 && (compat == "0.10" || cluster_size < 16 * KIB) {
                        continue;
                    }
                    shapes.push(Self {
                        compat,
                        cluster_size,
                        refcount_bits,
                        compression: None,
                        extended_l2,
                        lazy_refcounts: false,
                        preallocation: "off",
                        backing: false,
                        data_file: false,
                        data_file_raw: false,
                    });
                }
            }
        }
        shapes
    }

    /// Returns all shapes, combined with compression, backing file and data file where the format allows it.
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for shape in Self::shapes() {
            for compression in [None, Some("zlib"), Some("zstd")] {
                for backing in [false, true] {
                    for data_file in [false, true] {
                        let v2 = shape.compat == "0.10";
                        if (v2 && (compression == Some("zstd") || data_file))
                            || (compression.is_some() && data_file)
                        {
                            continue;
                        }
                        all.push(Self { compression, backing, data_file, ..shape });
                    }
                }
            }
        }
        all
    }

    /// Returns the creation options as text.
    fn options(&self) -> String {
        let mut set = format!("compat={},cluster_size={}", self.compat, self.cluster_size);
        let mut add = |is_set: bool, option: &str| {
            if is_set {
                set.push(',');
                set.push_str(option);
            }
        };
        let v3 = self.compat == "1.1";
        add(v3, &format!("refcount_bits={}", self.refcount_bits));
        add(v3, &format!("compression_type={}", self.compression.unwrap_or("zlib")));
        add(self.extended_l2, "extended_l2=on");
        add(self.lazy_refcounts, "lazy_refcounts=on");
        add(self.preallocation != "off", &format!("preallocation={}", self.preallocation));
        add(self.backing, "backing_file=base,backing_fmt=raw");
        add(self.data_file, "data_file=data");
        add(self.data_file_raw, "data_file_raw=on");
        set
    }
}

/// Calls `each` for all items of `work` on several threads. Each thread has a directory that `prepare`
/// filled.
fn for_each<T: Sync + std::fmt::Debug>(
    work: &[T],
    prepare: impl Fn(&Path) + Sync,
    each: impl Fn(&Path, &T) + Sync,
) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let directory = laws::scratch();
                prepare(directory.path());
                while let Some(item) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // The test harness shows it if an assertion fails.
                    println!("{item:?}");
                    each(directory.path(), item);
                }
            });
        }
    });
}

/// Returns the content of the backing file `base`: shorter than the disk, and of a size that no cluster size
/// divides.
fn base_image() -> Image {
    let content = Content::zero()
        .with(0..MIB, Fill::Text)
        .with(MIB + 500 * KIB..2 * MIB, Fill::Random)
        .with(2 * MIB..2 * MIB + 100 * KIB + 512, Fill::Byte(0xb0));
    Image::disk("base", 2 * MIB + 100 * KIB + 512, content)
}

fn write_raw(image: &Image, directory: &Path, name: &str) {
    let made = laws::make(&RawDriver, &CreateOptions::default(), image, directory);
    std::fs::rename(made, directory.join(name)).unwrap();
}

/// Fills a disk of 4160 KiB with all kinds of clusters of its variant.
fn scribble(directory: &Path, variant: &Variant) {
    let mut commands = Vec::new();
    if variant.compression.is_some() {
        // Compressed writes need unallocated clusters.
        commands.push("write -c -s text 2M 2M");
    }
    commands.extend([
        "write -P 1 0 70k",
        "write -P 2 300000 1234",
        "write -P 3 1M 512",
        "write -s text 1200k 300k",
        "write -z 1300k 100k",
        "discard 1408k 64k",
        "write -P 78 2300k 9k",
        "write -P 9 4159k 1k",
    ]);
    if variant.compat == "1.1" {
        commands.extend(["write -z -u 1600k 64k", "write -z 500k 100k"]);
    }
    let mut args: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    args.extend(["-f", "qcow2", "x"]);
    run_in("qemu-io", directory, &args);
}

#[test]
fn reads_every_qemu_variant() {
    require!("qemu-img", "qemu-io");
    let variants = Variant::all();
    // Version 3: seven refcount widths, six combinations of cluster size and subclusters, eight ways to store
    // data. Version 2: four cluster sizes, four ways.
    assert_eq!(variants.len(), 7 * 6 * 8 + 4 * 4);
    let prepare = |directory: &Path| {
        write_raw(&base_image(), directory, "base");
        let text: Vec<u8> =
            (0..30_000u32).flat_map(|i| format!("line {} of it\n", i * i % 1009).into_bytes()).collect();
        std::fs::write(directory.join("text"), text).unwrap();
    };
    for_each(&variants, prepare, |directory, variant| {
        let set = variant.options();
        run_in("qemu-img", directory, &["create", "-q", "-f", "qcow2", "-o", &set, "x", "4160k"]);
        scribble(directory, variant);
        run_in("qemu-img", directory, &["convert", "-f", "qcow2", "-O", "raw", "x", "theirs"]);
        let ours = convert(
            (&Qcow2Driver, &directory.join("x"), &open_options()),
            (&RawDriver, &directory.join("ours"), &CreateOptions::default()),
            2,
        )
        .unwrap();
        let (theirs, ours) = (std::fs::read(directory.join("theirs")).unwrap(), std::fs::read(ours).unwrap());
        assert_eq!(theirs.len(), ours.len(), "{variant:?}");
        assert_eq!(theirs.iter().zip(&ours).position(|(a, b)| a != b), None, "{variant:?}");
        let report = Qcow2Driver.check(laws::input(&directory.join("x")).unwrap(), &open_options()).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{variant:?}: {:?}", report.findings);
    });
}

/// Returns the disk to write. Compared with the base, it has equal parts, different data, zeros in place of
/// data, and a longer end.
pub fn disk() -> Image {
    let content = Content::zero()
        .with(0..MIB - 70 * KIB, Fill::Text)
        .with(MIB..MIB + 200_001, Fill::Checker(4096))
        .with(MIB + 700 * KIB..2 * MIB - 300 * KIB, Fill::Random)
        .with(2 * MIB + 300 * KIB..2 * MIB + 300 * KIB + 1, Fill::Byte(1))
        .with(3 * MIB - 513..3 * MIB, Fill::Text);
    Image::disk("disk", 3 * MIB, content)
}

#[test]
fn other_readers_accept_every_variant_we_write() {
    require!("qemu-img");
    let mut variants = Vec::new();
    for variant in Variant::all() {
        let kinds: &[&str] = match variant.compression.is_some() || variant.backing {
            true => &["off"],
            false => &["off", "metadata", "falloc", "full"],
        };
        for preallocation in kinds {
            let raw =
                [false, true].into_iter().take(if variant.data_file && !variant.backing { 2 } else { 1 });
            variants.extend(raw.map(|data_file_raw| Variant { preallocation, data_file_raw, ..variant }));
        }
    }
    // A header bit without further effect, set in every other variant of version 3.
    for (index, variant) in variants.iter_mut().enumerate() {
        variant.lazy_refcounts = variant.compat == "1.1" && index % 2 == 0;
    }
    // Version 3: three places for data times four preallocations, two variants with a backing file, and two
    // compressions with and without a backing file.
    assert_eq!(variants.len(), 7 * 6 * (3 * 4 + 2 + 4) + 4 * (4 + 1 + 2));
    let image = disk();
    let content = content_of(&image);
    let prepare = |directory: &Path| {
        write_raw(&base_image(), directory, "base");
        write_raw(&image, directory, "raw");
    };
    for_each(&variants, prepare, |directory, variant| {
        write_variant(directory, variant, &image);
        assert_clean_qcow2(directory, "x", "raw");
        assert_info(directory, variant);
        if variant.data_file_raw {
            assert!(
                std::fs::read(directory.join("data")).unwrap() == content,
                "{variant:?}: the data file is not the disk"
            );
        }
        // imago supports neither zstd nor extended L2 entries.
        if variant.compression != Some("zstd") && !variant.extended_l2 {
            let path = directory.join("x");
            let disk =
                Qcow2::<File>::builder_path(&path).open(PermissiveImplicitOpenGate::default()).unwrap();
            let mut theirs = vec![1; content.len()];
            FormatAccess::new(disk).read(&mut theirs[..], 0).unwrap();
            assert_eq!(theirs.iter().zip(&content).position(|(a, b)| a != b), None, "imago: {variant:?}");
        }
    });
}

/// Returns the content of a disk of 3 MiB.
pub fn content_of(image: &Image) -> Vec<u8> {
    let mut content = vec![0; 3 << 20];
    image.devices[0].1.read(&mut content, 0);
    content
}

/// Writes `image` to the file `x`, as `variant`.
pub fn write_variant(directory: &Path, variant: &Variant, image: &Image) {
    let mut options = options(&variant.options());
    options.compress = variant.compression.map(|_| imgtool_core::Compress::default());
    let base = directory.join("base");
    write(image, &options, variant.backing.then_some(&base), &directory.join("x"));
}

/// Asserts that `qemu-img info` shows the options of `variant`.
fn assert_info(directory: &Path, variant: &Variant) {
    let info = run_json_in("qemu-img", directory, &["info", "--output=json", "x"]);
    let data = &info["format-specific"]["data"];
    assert_eq!(info["virtual-size"], 3 * MIB, "{variant:?}");
    assert_eq!(info["cluster-size"], variant.cluster_size, "{variant:?}");
    assert_eq!(data["compat"], variant.compat, "{variant:?}");
    assert_eq!(data["refcount-bits"], variant.refcount_bits, "{variant:?}");
    assert_eq!(data["compression-type"], variant.compression.unwrap_or("zlib"), "{variant:?}");
    let (base, format) = (info["backing-filename"].as_str(), info["backing-filename-format"].as_str());
    assert_eq!(
        (base, format),
        if variant.backing { (Some("base"), Some("raw")) } else { (None, None) },
        "{variant:?}"
    );
    if variant.compat == "1.1" {
        assert_eq!(data["extended-l2"], variant.extended_l2, "{variant:?}");
        assert_eq!(data["lazy-refcounts"], variant.lazy_refcounts, "{variant:?}");
        assert_eq!(data["corrupt"], false, "{variant:?}");
        assert_eq!(data["data-file"].as_str(), variant.data_file.then_some("data"), "{variant:?}");
        assert_eq!(data["data-file-raw"].as_bool().unwrap_or(false), variant.data_file_raw, "{variant:?}");
    }
}
