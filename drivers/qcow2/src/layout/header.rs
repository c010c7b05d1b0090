//! Header: fields and features, checked against the limits that all other code relies on.

use imgtool_core::{Error, Output, RandomInput, Remedy, Result};
use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::entry::Shape;
use super::extension::{Extensions, FeatureKind, FeatureName};
use super::table::check_table;
use super::{
    MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS, MIN_EXTENDED_L2_CLUSTER_BITS,
};

/// Magic number at the start of an image. Specification, "Header".
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Length in bytes of a version 2 header. Specification, "Header".
pub const V2_HEADER_LEN: u32 = 72;
/// Minimum length in bytes of a version 3 header. Specification, "header_length".
const V3_MIN_HEADER_LEN: u32 = 104;
/// Length in bytes of the version 3 header that the driver writes. When reading, it ignores later fields.
pub const V3_HEADER_LEN: u32 = 112;

/// Incompatible feature: the image was not closed cleanly. Specification, "incompatible_features", like the
/// next four.
pub const INCOMPATIBLE_DIRTY: u64 = 1;
/// Incompatible feature: structures may be damaged.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data is in an external data file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: compressed clusters do not use deflate.
pub const INCOMPATIBLE_COMPRESSION_TYPE: u64 = 1 << 3;
/// Incompatible feature: L2 entries describe subclusters.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// All incompatible features that the driver knows.
const INCOMPATIBLE_KNOWN: u64 = 0x1f;
/// Compatible feature: refcounts may be written late. Specification, "compatible_features".
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
/// File offset of the field "autoclear_features". Specification, "Header".
const AUTOCLEAR_FIELD: u64 = 88;
/// Autoclear feature: the bitmaps are consistent. Specification, "autoclear_features", like the next.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature: the data file by itself is a raw image of the disk.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

/// Header as stored, with the specification's field names. The number at each field is its file offset.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// 0
    pub magic: [u8; 4],
    /// 4
    pub version: U32,
    /// 8
    pub backing_file_offset: U64,
    /// 16
    pub backing_file_size: U32,
    /// 20
    pub cluster_bits: U32,
    /// 24
    pub size: U64,
    /// 32
    pub crypt_method: U32,
    /// 36; number of entries
    pub l1_size: U32,
    /// 40
    pub l1_table_offset: U64,
    /// 48
    pub refcount_table_offset: U64,
    /// 56
    pub refcount_table_clusters: U32,
    /// 60
    pub nb_snapshots: U32,
    /// 64
    pub snapshots_offset: U64,
    /// 72; only in version 3, like all following fields
    pub incompatible_features: U64,
    /// 80
    pub compatible_features: U64,
    /// 88
    pub autoclear_features: U64,
    /// 96
    pub refcount_order: U32,
    /// 100
    pub header_length: U32,
    /// 104; only if `header_length` includes it
    pub compression_type: u8,
    /// 105
    pub padding: [u8; 7],
}

const _: () = assert!(size_of::<RawHeader>() == V3_HEADER_LEN as usize);

/// Number of the encryption with LUKS. Specification, "crypt_method".
pub const CRYPT_LUKS: u32 = 2;

/// Encryption of guest data. Specification, "crypt_method".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// No encryption.
    None,
    /// AES-CBC, deprecated by QEMU.
    Aes,
    /// LUKS.
    Luks,
}

/// Compression algorithm of an image. Specification, "compression_type".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionType {
    /// Deflate without a zlib header. QEMU calls it zlib.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl CompressionType {
    /// Returns the name that QEMU uses.
    pub fn name(self) -> &'static str {
        match self {
            CompressionType::Zlib => "zlib",
            CompressionType::Zstd => "zstd",
        }
    }
}

/// Checked header: every table offset is aligned, and every count is within its limit.
#[derive(Debug, Clone)]
pub struct Header {
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Cluster size and entry format.
    pub shape: Shape,
    /// Size in bytes of the disk that the guest sees.
    pub virtual_size: u64,
    /// Encryption of guest data.
    pub encryption: Encryption,
    /// Host offset of the active L1 table.
    pub l1_offset: u64,
    /// Number of entries in the active L1 table.
    pub l1_entries: u32,
    /// Host offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Number of clusters in the refcount table.
    pub refcount_table_clusters: u32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Number of entries in the snapshot table.
    pub snapshot_count: u32,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Refcount width as a power of two, 0 to 6: a refcount has 2^order bits.
    pub refcount_order: u32,
    /// Compression algorithm; the stored number as `Err` if it is unknown.
    pub compression: Result<CompressionType, u8>,
    /// Name of the backing file; untrusted.
    pub backing_file: Option<String>,
    /// Header extensions.
    pub extensions: Extensions,
}

impl Header {
    /// Reads and checks the header.
    pub fn read(input: &RandomInput) -> Result<Self> {
        let mut bytes = [0u8; V3_HEADER_LEN as usize];
        let available = input.len().min(u64::from(V3_HEADER_LEN)) as usize;
        input.read_exact_at(&mut bytes[..available], 0)?;
        if available < 8 || bytes[..4] != MAGIC {
            return Err(Error::wrong_format("is not a qcow2 image: the magic number is missing")
                .hint("omit the format to detect it from the content"));
        }
        if available < V2_HEADER_LEN as usize {
            return Err(
                Error::corrupt(format!("the file ends within the header, after {available} bytes")).at(0)
            );
        }
        let raw = RawHeader::read_from_bytes(&bytes)
            .map_err(|_| Error::malformed("the header has a wrong length"))?;
        let version = raw.version.get();
        if version == 1 {
            return Err(Error::unsupported("is a QCOW version 1 image, a format before qcow2")
                .hint("it can be read as the format qcow, but not written: convert it to qcow2 first"));
        }
        if version != 2 && version != 3 {
            return Err(Error::unsupported(format!(
                "unknown qcow2 version {version}; only 2 and 3 are supported"
            ))
            .at(4));
        }
        Self::from_raw(&raw, version, input)
    }

    fn from_raw(raw: &RawHeader, version: u32, input: &RandomInput) -> Result<Self> {
        let cluster_bits = raw.cluster_bits.get();
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Error::malformed(format!(
                "cluster_bits is {cluster_bits}, not within {MIN_CLUSTER_BITS}..{MAX_CLUSTER_BITS}"
            ))
            .at(20));
        }
        let header_len = header_len(raw, version, 1 << cluster_bits)?;
        let v3 = version >= 3;
        let field = |value: u64| if v3 { value } else { 0 };
        let incompatible = field(raw.incompatible_features.get());
        let compression_type = if v3 && header_len > V3_MIN_HEADER_LEN { raw.compression_type } else { 0 };
        let shape = Shape { cluster_bits, extended_l2: incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 };
        let mut header = Self {
            version,
            shape,
            virtual_size: raw.size.get(),
            encryption: encryption(raw.crypt_method.get())?,
            l1_offset: raw.l1_table_offset.get(),
            l1_entries: raw.l1_size.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            snapshot_count: raw.nb_snapshots.get(),
            incompatible,
            compatible: field(raw.compatible_features.get()),
            autoclear: field(raw.autoclear_features.get()),
            refcount_order: if v3 { raw.refcount_order.get() } else { 4 },
            compression: match compression_type {
                0 => Ok(CompressionType::Zlib),
                1 => Ok(CompressionType::Zstd),
                other => Err(other),
            },
            backing_file: None,
            extensions: Extensions::default(),
        };
        header.check_limits(compression_type)?;
        header.read_names(raw, header_len, input)?;
        header.check_encryption()?;
        Ok(header)
    }

    /// Checks each field against its bounds.
    fn check_limits(&self, compression_type: u8) -> Result<()> {
        self.check_features(compression_type)?;
        self.check_tables()?;
        self.check_l1_covers_disk()
    }

    /// Checks the refcount width, and the feature bits against the cluster size and the compression type.
    fn check_features(&self, compression_type: u8) -> Result<()> {
        if self.shape.extended_l2 && self.shape.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            let cluster_size = self.shape.cluster_size();
            return Err(Error::malformed(format!(
                "clusters of {cluster_size} bytes are too small for extended L2 entries; they need 16384"
            ))
            .at(20));
        }
        if self.refcount_order > 6 {
            return Err(
                Error::malformed(format!("refcount_order is {}, above 6", self.refcount_order)).at(96)
            );
        }
        let flagged = self.incompatible & INCOMPATIBLE_COMPRESSION_TYPE != 0;
        if flagged != (compression_type != 0) {
            return Err(Error::malformed(format!(
                "compression_type is {compression_type}, which contradicts the compression type feature bit"
            ))
            .at(104));
        }
        Ok(())
    }

    /// Checks the locations and sizes of the L1, refcount and snapshot tables.
    fn check_tables(&self) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let l1_len = u64::from(self.l1_entries) * 8;
        check_table("the L1 table", self.l1_offset, l1_len, MAX_L1_BYTES, cluster_size, 40)?;
        check_table(
            "the refcount table",
            self.refcount_table_offset,
            u64::from(self.refcount_table_clusters) * cluster_size,
            MAX_REFCOUNT_TABLE_BYTES,
            cluster_size,
            48,
        )?;
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(
                Error::limit(format!("{} snapshots, above {MAX_SNAPSHOTS}", self.snapshot_count)).at(60)
            );
        }
        if self.snapshot_count > 0 {
            check_table("the snapshot table", self.snapshots_offset, 0, u64::MAX, cluster_size, 64)?;
        }
        Ok(())
    }

    /// Checks that the L1 table has an entry for every part of the disk.
    fn check_l1_covers_disk(&self) -> Result<()> {
        let needed = self.shape.l1_entries(self.virtual_size);
        if u64::from(self.l1_entries) < needed {
            return Err(Error::malformed(format!(
                "the L1 table has {} entries, but {} bytes of disk need {needed}",
                self.l1_entries, self.virtual_size
            ))
            .at(36));
        }
        Ok(())
    }

    /// Refuses a LUKS header in an image whose encryption is another: read without it, an encrypted disk is noise.
    fn check_encryption(&self) -> Result<()> {
        if self.extensions.crypto_header.is_none() || self.encryption == Encryption::Luks {
            return Ok(());
        }
        Err(Error::malformed(format!(
            "the image has an encryption header (LUKS), but crypt_method is {}, not {CRYPT_LUKS}",
            self.crypt_method()
        ))
        .at(32)
        .hint("the header is damaged: use a backup"))
    }

    /// Reads the rest of the first cluster: extensions and the backing file's name.
    fn read_names(&mut self, raw: &RawHeader, header_len: u32, input: &RandomInput) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let (name_offset, name_len) = (raw.backing_file_offset.get(), raw.backing_file_size.get());
        let first = input.read_vec(0, usize::try_from(input.len().min(cluster_size)).unwrap_or(0))?;
        let mut area_end = first.len();
        if name_offset != 0 {
            let end = name_offset.checked_add(u64::from(name_len)).filter(|end| *end <= cluster_size);
            let (Some(end), true) = (end, name_len <= MAX_BACKING_NAME) else {
                return Err(Error::malformed(format!(
                    "the backing file's name ({name_len} bytes at {name_offset}) is longer than {MAX_BACKING_NAME} bytes or leaves the first cluster"
                ))
                .at(8));
            };
            let name = usize::try_from(name_offset).ok().zip(usize::try_from(end).ok());
            let Some(name) = name.and_then(|(start, end)| first.get(start..end)) else {
                return Err(Error::corrupt("the file ends within the backing file's name").at(name_offset));
            };
            self.backing_file =
                Some(String::from_utf8_lossy(name).into_owned()).filter(|name| !name.is_empty());
            area_end = area_end.min(usize::try_from(name_offset).unwrap_or(area_end));
        }
        if let Some(area) = first.get(header_len as usize..area_end) {
            self.extensions = Extensions::parse(area, u64::from(header_len))?;
        }
        Ok(())
    }

    /// Refuses an image with features that the driver does not know.
    pub fn check_known(&self) -> Result<()> {
        match self.unknown_features() {
            0 => Ok(()),
            unknown => {
                let names = self.feature_list(unknown);
                Err(Error::unsupported(format!("the image needs unknown features: {names}"))
                    .at(72)
                    .hint("a newer version of this program or of qemu-img may know them"))
            }
        }
    }

    /// Clears the autoclear bits of features that the driver does not know: it will not keep their data up to date.
    pub fn clear_unknown_autoclear(&self, output: &Output) -> Result<()> {
        let kept = self.autoclear & (AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW);
        if kept == self.autoclear {
            return Ok(());
        }
        output.write_at(&kept.to_be_bytes(), AUTOCLEAR_FIELD)
    }

    /// Refuses an image that the driver cannot read, and names the reason. Refuses an image marked corrupt
    /// unless `force` is set.
    pub fn check_readable(&self, force: bool) -> Result<()> {
        self.check_known()?;
        if self.incompatible & INCOMPATIBLE_CORRUPT != 0 && !force {
            return Err(Error::refused("the image is marked corrupt")
                .at(72)
                .remedied_by(Remedy::OpenAnyway("repair a copy with 'qemu-img check -r all'".into())));
        }
        if let Err(number) = self.compression {
            return Err(Error::unsupported(format!("unknown compression type {number}")).at(104));
        }
        Ok(())
    }

    /// Returns the field "crypt_method".
    pub fn crypt_method(&self) -> u32 {
        match self.encryption {
            Encryption::None => 0,
            Encryption::Aes => 1,
            Encryption::Luks => 2,
        }
    }

    /// Lists incompatible feature bits by number, with their names from the image's feature name table.
    pub fn feature_list(&self, bits: u64) -> String {
        let names: Vec<String> = (0..64)
            .filter(|bit| bits >> bit & 1 == 1)
            .map(|bit| match self.extensions.feature_name(FeatureKind::Incompatible, bit) {
                Some(name) if !name.is_empty() => format!("'{name}' (bit {bit})"),
                _ => format!("bit {bit}"),
            })
            .collect();
        names.join(", ")
    }

    /// Returns the incompatible feature bits that the driver does not know.
    pub fn unknown_features(&self) -> u64 {
        self.incompatible & !INCOMPATIBLE_KNOWN
    }

    /// True if the image has any of the feature bits `incompatible`.
    pub fn has(&self, incompatible: u64) -> bool {
        self.incompatible & incompatible != 0
    }

    /// Returns the largest refcount that fits into the image's refcount width.
    pub fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Returns the number of bits in a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }
}

/// Checks and returns the length in bytes of the header.
fn header_len(raw: &RawHeader, version: u32, cluster_size: u64) -> Result<u32> {
    if version == 2 {
        return Ok(V2_HEADER_LEN);
    }
    let len = raw.header_length.get();
    if len < V3_MIN_HEADER_LEN || !len.is_multiple_of(8) || u64::from(len) > cluster_size {
        return Err(Error::malformed(format!(
            "header_length is {len}, not a multiple of 8 within {V3_MIN_HEADER_LEN}..{cluster_size}"
        ))
        .at(100));
    }
    Ok(len)
}

/// Decodes the field "crypt_method".
fn encryption(method: u32) -> Result<Encryption> {
    match method {
        0 => Ok(Encryption::None),
        1 => Ok(Encryption::Aes),
        CRYPT_LUKS => Ok(Encryption::Luks),
        other => Err(Error::unsupported(format!("unknown encryption method {other}")).at(32)),
    }
}

/// Returns the feature name table of a new image, in the words of the specification and QEMU.
pub fn known_feature_names() -> Vec<FeatureName> {
    let names: [(FeatureKind, u8, &str); 8] = [
        (FeatureKind::Incompatible, 0, "dirty bit"),
        (FeatureKind::Incompatible, 1, "corrupt bit"),
        (FeatureKind::Incompatible, 2, "external data file"),
        (FeatureKind::Incompatible, 3, "compression type"),
        (FeatureKind::Incompatible, 4, "extended L2 entries"),
        (FeatureKind::Compatible, 0, "lazy refcounts"),
        (FeatureKind::Autoclear, 0, "bitmaps"),
        (FeatureKind::Autoclear, 1, "raw external data"),
    ];
    names.into_iter().map(|(kind, bit, name)| FeatureName { kind, bit, name: name.into() }).collect()
}
