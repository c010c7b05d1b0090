//! Header extensions: names of files and features, locations of the bitmap directory and encryption header.

use imgtool_core::{Error, Result};

use super::MAX_EXTENSION_TEXT;
use super::table::{be32, be64};

/// Type of the extension that ends the list. Specification, "Header extensions", like the types below.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO_HEADER: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;

/// Size in bytes of an entry of the feature name table. Specification, "Feature name table".
const FEATURE_ENTRY: usize = 48;

/// Header extensions of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extensions {
    /// Format name of the backing file; untrusted.
    pub backing_format: Option<String>,
    /// Name of the external data file; untrusted.
    pub data_file: Option<String>,
    /// Names of feature bits; untrusted.
    pub feature_names: Vec<FeatureName>,
    /// Bitmaps extension.
    pub bitmaps: Option<BitmapsExtension>,
    /// Host offset and length in bytes of the encryption header.
    pub crypto_header: Option<(u64, u64)>,
}

/// One of the three feature fields of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureKind {
    /// Features that a reader must know.
    Incompatible,
    /// Features that a reader may ignore.
    Compatible,
    /// Features that a reader may ignore. A writer that does not know them clears their bits.
    Autoclear,
}

/// Entry of the feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// Field that contains the bit.
    pub kind: FeatureKind,
    /// Bit number, 0 to 63 in a sound image.
    pub bit: u8,
    /// Name; untrusted.
    pub name: String,
}

/// Bitmaps extension: the location of the bitmap directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps.
    pub count: u32,
    /// Length of the directory in bytes.
    pub directory_len: u64,
    /// Host offset of the directory.
    pub directory_offset: u64,
}

impl Extensions {
    /// Parses `area`, the bytes from the end of the header (host offset `area_offset`) to the backing file's
    /// name or the end of the cluster. Ignores unknown extensions.
    pub fn parse(area: &[u8], area_offset: u64) -> Result<Self> {
        let mut found = Self::default();
        let mut at = 0usize;
        while let (Some(kind), Some(len)) = (be32(area, at), be32(area, at + 4)) {
            if kind == END {
                break;
            }
            let host_offset = area_offset + at as u64;
            let start = at + 8;
            let data = usize::try_from(len).ok().and_then(|len| area.get(start..start.checked_add(len)?));
            let Some(data) = data else {
                return Err(Error::malformed(format!(
                    "header extension {kind:#010x} has {len} bytes, but only {} are left",
                    area.len() - start
                ))
                .at(host_offset));
            };
            found.add(kind, data, host_offset)?;
            at = start + data.len().next_multiple_of(8);
        }
        Ok(found)
    }

    fn add(&mut self, kind: u32, data: &[u8], host_offset: u64) -> Result<()> {
        match kind {
            BACKING_FORMAT => self.backing_format = Some(name(data, host_offset)?),
            DATA_FILE => self.data_file = Some(name(data, host_offset)?),
            FEATURE_NAMES => {
                for entry in data.chunks_exact(FEATURE_ENTRY) {
                    let kind = match entry[0] {
                        0 => FeatureKind::Incompatible,
                        1 => FeatureKind::Compatible,
                        2 => FeatureKind::Autoclear,
                        _ => continue,
                    };
                    self.feature_names.push(FeatureName { kind, bit: entry[1], name: string(&entry[2..]) });
                }
            }
            CRYPTO_HEADER => self.crypto_header = be64(data, 0).zip(be64(data, 8)),
            BITMAPS => {
                let (Some(count), Some(directory_len), Some(directory_offset)) =
                    (be32(data, 0), be64(data, 8), be64(data, 16))
                else {
                    return Err(Error::malformed(format!(
                        "the bitmaps extension has {} bytes, not 24",
                        data.len()
                    ))
                    .at(host_offset));
                };
                self.bitmaps = Some(BitmapsExtension { count, directory_len, directory_offset });
            }
            _ => {}
        }
        Ok(())
    }

    /// Returns the name of a feature bit from the image's feature name table.
    pub fn feature_name(&self, kind: FeatureKind, bit: u32) -> Option<&str> {
        self.feature_names
            .iter()
            .find(|known| known.kind == kind && u32::from(known.bit) == bit)
            .map(|known| known.name.as_str())
    }

    /// Encodes the extensions of a new image, and ends the list.
    /// Leaves out the feature names, which serve only for messages, if the result would otherwise exceed
    /// `max_len` bytes.
    pub fn encode(&self, max_len: usize) -> Vec<u8> {
        let mut bytes = self.encode_all();
        if bytes.len() > max_len && !self.feature_names.is_empty() {
            bytes = Self { feature_names: Vec::new(), ..self.clone() }.encode_all();
        }
        bytes
    }

    fn encode_all(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(format) = &self.backing_format {
            push(&mut bytes, BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            push(&mut bytes, DATA_FILE, name.as_bytes());
        }
        if let Some(BitmapsExtension { count, directory_len, directory_offset }) = self.bitmaps {
            let mut data = [count, 0].map(u32::to_be_bytes).concat();
            data.extend([directory_len, directory_offset].map(u64::to_be_bytes).concat());
            push(&mut bytes, BITMAPS, &data);
        }
        if let Some((offset, len)) = self.crypto_header {
            push(&mut bytes, CRYPTO_HEADER, &[offset.to_be_bytes(), len.to_be_bytes()].concat());
        }
        if !self.feature_names.is_empty() {
            let mut table = Vec::new();
            for feature in &self.feature_names {
                let mut entry = [0u8; FEATURE_ENTRY];
                entry[0] = match feature.kind {
                    FeatureKind::Incompatible => 0,
                    FeatureKind::Compatible => 1,
                    FeatureKind::Autoclear => 2,
                };
                entry[1] = feature.bit;
                let name = &feature.name.as_bytes()[..feature.name.len().min(FEATURE_ENTRY - 2)];
                entry[2..2 + name.len()].copy_from_slice(name);
                table.extend_from_slice(&entry);
            }
            push(&mut bytes, FEATURE_NAMES, &table);
        }
        push(&mut bytes, END, &[]);
        bytes
    }
}

fn push(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    // Our names and tables are far shorter than 2^32 bytes.
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// Decodes a name of at most [`MAX_EXTENSION_TEXT`] bytes.
fn name(data: &[u8], host_offset: u64) -> Result<String> {
    if data.len() > MAX_EXTENSION_TEXT {
        return Err(Error::limit(format!(
            "a name in a header extension has {} bytes; the limit is {MAX_EXTENSION_TEXT}",
            data.len()
        ))
        .at(host_offset));
    }
    Ok(string(data))
}

/// Decodes the text before the first zero byte.
fn string(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn encoding_round_trips() {
        let extensions = Extensions {
            backing_format: Some("raw".into()),
            data_file: Some("a file.raw".into()),
            bitmaps: Some(BitmapsExtension { count: 3, directory_len: 96, directory_offset: 1 << 20 }),
            feature_names: vec![FeatureName {
                kind: FeatureKind::Incompatible,
                bit: 0,
                name: "dirty bit".into(),
            }],
            ..Extensions::default()
        };
        let bytes = extensions.encode(4096);
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(Extensions::parse(&bytes, 112).unwrap(), extensions);
        assert!(Extensions::parse(&extensions.encode(60), 112).unwrap().feature_names.is_empty());
    }

    #[test]
    fn rejects_an_extension_beyond_the_cluster() {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&DATA_FILE.to_be_bytes());
        bytes.extend_from_slice(&u32::MAX.to_be_bytes());
        bytes.extend_from_slice(&[0; 64]);
        assert!(Extensions::parse(&bytes, 104).is_err());
        assert_eq!(Extensions::parse(&[1, 2, 3], 104).unwrap(), Extensions::default());
    }
}
