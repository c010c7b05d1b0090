//! Options of a new image: declaration, parsing, and checks of their combinations.

use imgtool_core::{
    BackingName, CreateOptions, Error, OptionKind, OptionSpec, OptionValues, Remedy, Result, Secret,
};
use imgtool_crypt::{NewVolume, options as encryption};

use crate::compressed::check_level;
use crate::layout::entry::Shape;
use crate::layout::header::CompressionType;
use crate::layout::{
    MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS,
};

/// Default cluster size in bytes, the same as QEMU's.
const DEFAULT_CLUSTER_SIZE: u64 = 64 << 10;

/// Default refcount width, as a power of two: 16 bits. The only width that version 2 supports (specification,
/// "refcount_order"), and QEMU's default for version 3.
const DEFAULT_REFCOUNT_ORDER: u32 = 4;

/// Unit in bytes of virtual sizes. QEMU's limit: it counts sectors.
pub const SIZE_MULTIPLE: u64 = 512;

/// Unit in bytes of zero detection, and the smallest granule of a piece. Set by the toolkit.
pub const ZERO_GRANULARITY: u64 = imgtool_core::zero::ZERO_GRANULARITY as u64;

/// Declared options, with the names that qemu-img uses.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "compat",
        help: "version of the format: 1.1 is version 3, 0.10 is version 2",
        default: "1.1",
        kind: OptionKind::OneOf(&["0.10", "1.1", "v2", "v3"]),
    },
    OptionSpec {
        name: "cluster_size",
        help: "allocation unit",
        default: "64k",
        kind: OptionKind::PowerOfTwo { min: 1 << MIN_CLUSTER_BITS, max: 1 << MAX_CLUSTER_BITS },
    },
    OptionSpec {
        name: "refcount_bits",
        help: "width of a reference count",
        default: "16",
        kind: OptionKind::OneOfSizes(&[1, 2, 4, 8, 16, 32, 64]),
    },
    OptionSpec {
        name: "extended_l2",
        help: "subclusters of 1/32 cluster (clusters of 16k and more)",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: "compression_type",
        help: "algorithm of compressed clusters",
        default: "zlib",
        kind: OptionKind::OneOf(&["zlib", "zstd"]),
    },
    OptionSpec {
        name: "lazy_refcounts",
        help: "allow QEMU to write reference counts late",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: "preallocation",
        help: "space that is allocated before it is needed; over a backing file only in an empty image with \
               extended_l2",
        default: "off",
        kind: OptionKind::OneOf(&["off", "metadata", "falloc", "full"]),
    },
    OptionSpec {
        name: "backing_file",
        help: "image below the new one: only the difference to it is stored",
        default: "none",
        kind: OptionKind::Path,
    },
    OptionSpec {
        name: "backing_fmt",
        help: "format of the backing file",
        default: "none",
        kind: OptionKind::Text("a format name"),
    },
    OptionSpec {
        name: "data_file",
        help: "file that holds the guest's data beside the image",
        default: "none",
        kind: OptionKind::Path,
    },
    OptionSpec {
        name: "data_file_raw",
        help: "the data file is a raw image of its own",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: "encryption",
        help: "QEMU's first encryption, which is read but not written: off is accepted",
        default: "off",
        kind: OptionKind::Flag,
    },
    OptionSpec {
        name: ENCRYPT,
        help: "encrypt the guest's data; the image then differs from run to run",
        default: "none",
        kind: OptionKind::OneOf(&["luks"]),
    },
    OptionSpec {
        name: ENCRYPT_FORMAT,
        help: "qemu-img's name for encrypt",
        default: "none",
        kind: OptionKind::OneOf(&["luks"]),
    },
    encryption::cipher("encrypt.cipher-alg"),
    encryption::mode("encrypt.cipher-mode"),
    encryption::iv("encrypt.ivgen-alg"),
    encryption::iv_hash("encrypt.ivgen-hash-alg"),
    encryption::hash("encrypt.hash-alg"),
    encryption::iterations("encrypt.iterations"),
    encryption::iter_time("encrypt.iter-time"),
];

/// Name of the option that encrypts a new image.
const ENCRYPT: &str = "encrypt";

/// qemu-img's name for the same option.
const ENCRYPT_FORMAT: &str = "encrypt.format";

/// Space that is allocated before it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    Off,
    /// All tables; every guest cluster has a host cluster.
    Metadata,
    /// Like `Metadata`, with data clusters reserved in the file system.
    Falloc,
    /// Like `Metadata`, with every byte written.
    Full,
}

/// Checked options of a new image.
#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Cluster size and entry format.
    pub shape: Shape,
    /// Refcount width as a power of two: a refcount has 2^order bits.
    pub refcount_order: u32,
    /// Compression algorithm of compressed clusters.
    pub compression: CompressionType,
    /// True if the user named the algorithm, with the level or as an option.
    pub states_compression: bool,
    /// Compression level; `None` if clusters are not compressed.
    pub compress: Option<i32>,
    /// True if QEMU may write refcounts late.
    pub lazy_refcounts: bool,
    /// Space that is allocated before it is needed.
    pub preallocation: Preallocation,
    /// Backing file.
    pub backing: Option<BackingName>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// True if the data file by itself is a raw image of the disk.
    pub data_file_raw: bool,
    /// Encryption of guest data.
    pub encryption: Option<NewVolume>,
    /// Passphrase of an encrypted image.
    pub secret: Option<Secret>,
    /// Minimum length in bytes of zeros that are not stored, a power of two and at least 4 KiB; `None` if all
    /// zeros are stored.
    pub zero_unit: Option<u64>,
}

impl WriteOptions {
    /// Parses and checks all options.
    pub fn parse(options: &CreateOptions) -> Result<Self> {
        let values = &options.values;
        let flag = |name| values.flag(name).unwrap_or(false);
        let cluster_size = values.size("cluster_size").unwrap_or(DEFAULT_CLUSTER_SIZE);
        let compression = compression(options)?;
        let level = options.compress.as_ref().map(|compress| check_level(compression, compress.level));
        let parsed = Self {
            version: match values.text("compat") {
                Some("0.10" | "v2") => 2,
                _ => 3,
            },
            shape: Shape { cluster_bits: cluster_size.ilog2(), extended_l2: flag("extended_l2") },
            refcount_order: values.size("refcount_bits").map_or(DEFAULT_REFCOUNT_ORDER, u64::ilog2),
            compression,
            states_compression: states_compression(options),
            compress: level.transpose()?,
            lazy_refcounts: flag("lazy_refcounts"),
            preallocation: match values.text("preallocation") {
                Some("metadata") => Preallocation::Metadata,
                Some("falloc") => Preallocation::Falloc,
                Some("full") => Preallocation::Full,
                _ => Preallocation::Off,
            },
            backing: backing(values)?,
            data_file: values.text("data_file").map(str::to_owned),
            data_file_raw: flag("data_file_raw"),
            encryption: encryption(values)?,
            secret: options.secret.clone(),
            zero_unit: options.zero_unit(ZERO_GRANULARITY),
        };
        parsed.check_version()?;
        parsed.check_combinations()?;
        Ok(parsed)
    }

    /// Rejects features that version 2 lacks.
    fn check_version(&self) -> Result<()> {
        if self.version >= 3 {
            return Ok(());
        }
        let newer = [
            (self.shape.extended_l2, "extended_l2"),
            (self.refcount_order != DEFAULT_REFCOUNT_ORDER, "refcount_bits other than 16"),
            (self.compression != CompressionType::Zlib, "compression_type other than zlib"),
            (self.lazy_refcounts, "lazy_refcounts"),
            (self.data_file.is_some(), "data_file"),
        ];
        match newer.iter().find(|(used, _)| *used) {
            Some((_, what)) => Err(Error::usage(format!("{what} needs version 3 (compat=1.1)"))),
            None => Ok(()),
        }
    }

    /// Rejects options that exclude or require one another.
    fn check_combinations(&self) -> Result<()> {
        if self.shape.extended_l2 && self.shape.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(Error::usage("extended_l2 needs a cluster_size of at least 16k"));
        }
        let preallocated = self.preallocation != Preallocation::Off;
        let encrypted = self.encryption.is_some();
        let conflicts = [
            (encrypted && self.compress.is_some(), "encryption and compression can't be combined"),
            (encrypted && self.data_file.is_some(), "encryption and data_file can't be combined"),
            (encrypted && preallocated, "encryption and preallocation can't be combined"),
            // Zeros over a backing image have no entry of their own in version 2.
            (
                encrypted && self.backing.is_some() && self.version < 3,
                "encryption and backing_file need version 3 (compat=1.1)",
            ),
            (self.data_file_raw && self.data_file.is_none(), "data_file_raw needs data_file"),
            (
                self.data_file_raw && self.backing.is_some(),
                "data_file_raw and backing_file can't be combined",
            ),
            (
                self.compress.is_some() && self.data_file.is_some(),
                "compression and data_file can't be combined",
            ),
            (self.compress.is_some() && preallocated, "compression and preallocation can't be combined"),
        ];
        if let Some((_, message)) = conflicts.iter().find(|(conflict, _)| *conflict) {
            return Err(Error::usage(*message));
        }
        // An allocated cluster hides the backing image, unless it has subclusters.
        if self.backing.is_some() && preallocated && !self.shape.extended_l2 {
            return Err(Error::usage("backing_file and preallocation can only be combined with extended_l2")
                .remedied_by(Remedy::SetOption("extended_l2=on".into())));
        }
        Ok(())
    }

    /// True if zeros are stored like data, so that every guest cluster is stored.
    pub fn stores_zeros(&self) -> bool {
        self.zero_unit.is_none() || self.preallocation == Preallocation::Full
    }

    /// Refuses a disk of `virtual_size` bytes if its L1 table would exceed QEMU's limit.
    pub fn check_size(&self, virtual_size: u64) -> Result<()> {
        let max_entries = MAX_L1_BYTES / 8;
        if self.shape.l1_entries(virtual_size) <= max_entries {
            return Ok(());
        }
        let fitting_bits = (self.shape.cluster_bits..=MAX_CLUSTER_BITS)
            .find(|bits| Shape { cluster_bits: *bits, ..self.shape }.l1_entries(virtual_size) <= max_entries);
        let error = Error::limit(format!(
            "a disk of {virtual_size} bytes with clusters of {} bytes needs an L1 table above {MAX_L1_BYTES} bytes",
            self.shape.cluster_size()
        ));
        Err(match fitting_bits {
            Some(bits) => error.remedied_by(Remedy::SetOption(format!("cluster_size={}", 1u64 << bits))),
            None => error.hint("qcow2 does not support a disk this large; raw does"),
        })
    }
}

/// Returns the compression selected by the option `compression_type` or by the requested algorithm. If both
/// are given, they must agree.
fn compression(options: &CreateOptions) -> Result<CompressionType> {
    let parse = |name: &str| match name {
        "zlib" | "deflate" => Ok(CompressionType::Zlib),
        "zstd" => Ok(CompressionType::Zstd),
        other => Err(Error::usage(format!("qcow2 clusters are compressed with zlib or zstd, not '{other}'"))),
    };
    let from_option = options.values.text("compression_type").map(parse).transpose()?;
    let algorithm = options.compress.as_ref().and_then(|compress| compress.algorithm.as_deref());
    match (from_option, algorithm.map(parse).transpose()?) {
        (Some(one), Some(other)) if one != other => Err(Error::usage(format!(
            "compression_type={} contradicts the requested {}",
            one.name(),
            other.name()
        ))),
        (one, other) => Ok(other.or(one).unwrap_or(CompressionType::Zlib)),
    }
}

fn states_compression(options: &CreateOptions) -> bool {
    let algorithm = options.compress.as_ref().and_then(|compress| compress.algorithm.as_ref());
    algorithm.is_some() || options.values.text("compression_type").is_some()
}

/// Returns the encryption that the options select.
fn encryption(values: &OptionValues) -> Result<Option<NewVolume>> {
    if values.flag("encryption") == Some(true) {
        return Err(Error::usage("encryption=on would be QEMU's first encryption, which is not safe")
            .remedied_by(Remedy::SetOption(format!("{ENCRYPT}=luks"))));
    }
    let volume = encryption::parse(values, "encrypt.")?;
    if values.text(ENCRYPT).or(values.text(ENCRYPT_FORMAT)).is_some() {
        return Ok(Some(volume));
    }
    let is_set = |spec: &&OptionSpec| {
        spec.name.starts_with("encrypt.")
            && (values.text(spec.name).is_some() || values.size(spec.name).is_some())
    };
    match OPTIONS.iter().find(is_set) {
        Some(spec) => Err(Error::usage(format!("{} needs {ENCRYPT}", spec.name))
            .remedied_by(Remedy::SetOption(format!("{ENCRYPT}=luks")))),
        None => Ok(None),
    }
}

fn backing(values: &OptionValues) -> Result<Option<BackingName>> {
    match (values.text("backing_file"), values.text("backing_fmt")) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Error::usage("backing_fmt needs backing_file")),
        (Some(_), None) => Err(Error::usage("the format of the backing file is missing (backing_fmt)")
            .remedied_by(Remedy::SetOption("backing_fmt=FORMAT".into()))),
        (Some(name), Some(_)) if name.is_empty() || name.len() > MAX_BACKING_NAME as usize => {
            Err(Error::usage(format!(
                "the backing file's name must have 1 to {MAX_BACKING_NAME} bytes, not {}",
                name.len()
            )))
        }
        (Some(name), Some(format)) => {
            Ok(Some(BackingName { name: name.to_owned(), format: format.to_owned() }))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::layout::FORMAT;

    fn parse(pairs: &[(&str, &str)]) -> Result<WriteOptions> {
        WriteOptions::parse(&CreateOptions::parse(FORMAT, OPTIONS, pairs.iter().copied())?)
    }

    #[test]
    fn rejects_contradictory_options() {
        for bad in [
            &[("cluster_size", "256")][..],
            &[("cluster_size", "4M")],
            &[("cluster_size", "96k")],
            &[("refcount_bits", "12")],
            &[("refcount_bits", "128")],
            &[("compat", "0.9")],
            &[("compat", "0.10"), ("refcount_bits", "32")],
            &[("compat", "0.10"), ("compression_type", "zstd")],
            &[("compat", "v2"), ("lazy_refcounts", "on")],
            &[("extended_l2", "on"), ("cluster_size", "8k")],
            &[("data_file_raw", "on")],
            &[("backing_file", "x")],
            &[("backing_fmt", "raw")],
            &[("encryption", "on")],
            &[("backing_file", "x"), ("backing_fmt", "raw"), ("preallocation", "metadata")],
            &[("encrypt", "aes")],
            &[("encrypt.cipher-alg", "aes-128")],
            &[("encrypt", "luks"), ("preallocation", "full")],
            &[("encrypt.format", "luks"), ("data_file", "x")],
            &[("nonsense", "1")],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        let good = parse(&[("compat", "v3"), ("cluster_size", "2M"), ("refcount_bits", "1")]).unwrap();
        assert_eq!((good.version, good.shape.cluster_bits, good.refcount_order), (3, 21, 0));
    }

    #[test]
    fn suggests_a_cluster_size_for_a_disk_beyond_the_l1_limit() {
        let error = parse(&[]).unwrap().check_size(4 << 50).unwrap_err();
        assert_eq!(error.remedy(), Some(&Remedy::SetOption("cluster_size=131072".into())));
        assert!(parse(&[]).unwrap().check_size(2 << 50).is_ok());
        assert!(parse(&[("cluster_size", "2M")]).unwrap().check_size(8 << 60).is_err());
    }
}
