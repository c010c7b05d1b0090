//! `fixtures/manifest.json`: what the fixtures hold.

use serde::Deserialize;

use crate::fixture;

/// The manifest.
#[derive(Debug, Deserialize)]
struct Manifest {
    archives: Vec<Entry>,
}

/// One archive.
#[derive(Debug, Deserialize)]
pub struct Entry {
    /// Its file name.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// The digest of the file itself.
    #[serde(rename = "file-sha256")]
    pub file_sha256: String,
    /// Its outer compression.
    pub compression: Option<String>,
    /// The archive's UUID.
    pub uuid: String,
    /// The names of its configurations.
    pub attachments: Vec<String>,
    /// Its devices.
    pub devices: Vec<DeviceEntry>,
}

/// One device of an archive.
#[derive(Debug, Deserialize)]
pub struct DeviceEntry {
    /// Its id.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// "disk" or "vmstate".
    pub kind: String,
    /// Its size in bytes.
    pub size: u64,
    /// The digest of its content.
    pub sha256: String,
}

impl DeviceEntry {
    /// The file it is written to in a directory of outputs.
    pub fn file_name(&self, extension: &str) -> String {
        if self.kind == "vmstate" { "vmstate.bin".to_owned() } else { format!("{}.{extension}", self.name) }
    }
}

/// Every archive of the manifest.
pub fn archives() -> Vec<Entry> {
    let text = std::fs::read_to_string(fixture("manifest.json")).expect("manifest.json");
    let manifest: Manifest = serde_json::from_str(&text).expect("manifest.json is valid");
    assert!(!manifest.archives.is_empty());
    manifest.archives
}
