//! Reads `fixtures/manifest.json`, which describes the content of the fixtures.

use serde::Deserialize;

use crate::fixture;

/// The whole manifest.
#[derive(Debug, Deserialize)]
struct Manifest {
    archives: Vec<Entry>,
}

/// One archive.
#[derive(Debug, Deserialize)]
pub struct Entry {
    /// File name in `fixtures/`.
    pub file: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the file itself, in hexadecimal.
    #[serde(rename = "file-sha256")]
    pub file_sha256: String,
    /// Outer compression; `None` if the file has none.
    pub compression: Option<String>,
    /// UUID of the archive.
    pub uuid: String,
    /// Names of the configuration files.
    pub attachments: Vec<String>,
    /// Devices of the archive.
    pub devices: Vec<DeviceEntry>,
}

/// One device of an archive.
#[derive(Debug, Deserialize)]
pub struct DeviceEntry {
    /// Device id.
    pub id: u32,
    /// Device name.
    pub name: String,
    /// "disk" or "vmstate".
    pub kind: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
}

impl DeviceEntry {
    /// Returns the name of the file to which the device is extracted.
    pub fn file_name(&self, extension: &str) -> String {
        if self.kind == "vmstate" { "vmstate.bin".to_owned() } else { format!("{}.{extension}", self.name) }
    }
}

/// Returns every archive of the manifest.
pub fn archives() -> Vec<Entry> {
    let text = std::fs::read_to_string(fixture("manifest.json")).expect("manifest.json");
    let manifest: Manifest = serde_json::from_str(&text).expect("manifest.json is valid");
    assert!(!manifest.archives.is_empty());
    manifest.archives
}
