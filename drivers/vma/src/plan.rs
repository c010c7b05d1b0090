//! Plan of an archive to write: checked names, sizes and configurations, and the encoded header.
//!
//! Every known reader accepts planned archives: device names are unique and consist of letters, digits and
//! `._-`; sizes are whole sectors; the header has at most 512 KiB. The format allows more.

use std::collections::{BTreeMap, HashSet};

use imgtool_core::error::escape_control;
use imgtool_core::{Attachment, Device, DeviceKind, Error, Manifest, Remedy, Result};
use imgtool_machine::proxmox;
use md5::{Digest, Md5};
use uuid::Uuid;
use zerocopy::{FromZeros, IntoBytes};

use crate::layout::{
    HEADER_FIXED, HeaderLayout, MAGIC, MAX_BLOB, MAX_DEV_ID, MAX_DEVICE_SIZE, MAX_HEADER_WRITTEN,
    TABLE_ENTRIES, VERSION, VMSTATE_NAME, clusters_of, header_md5,
};
use crate::options::VmaOptions;

/// Unit in bytes of device sizes: the reference program counts in sectors and loses a partial one at the end
/// of a device.
pub(crate) const SECTOR: u64 = 512;
/// Maximum length in bytes of a device name: the reference program's `tmp-disk-NAME.raw` must not exceed 255
/// bytes, the limit of Linux file systems.
const MAX_NAME: usize = 242;
/// Maximum length in bytes of a configuration name: the reference program can't extract longer ones.
const MAX_CONFIG_NAME: usize = 242;
/// Unit in bytes of the header size, as in the reference program.
const HEADER_UNIT: usize = 512;

/// A device of the archive to write.
#[derive(Debug, Clone)]
pub(crate) struct PlannedDevice {
    /// Id of the device in the archive, 1 to 254.
    pub(crate) dev_id: u8,
    pub(crate) name: String,
    /// Size in bytes in the archive: the size in the manifest, rounded up to a multiple of [`SECTOR`].
    pub(crate) size: u64,
    /// True for the state of a running guest, which the sink stores in order and in full, zeros included.
    pub(crate) is_state: bool,
    /// Number of clusters.
    pub(crate) clusters: u64,
}

/// Everything about an archive that is known before its data.
#[derive(Debug)]
pub(crate) struct ArchivePlan {
    pub(crate) uuid: Uuid,
    /// The encoded header.
    pub(crate) header: Vec<u8>,
    /// Devices in the order of the manifest. Their `dev_id`s ascend from 1.
    pub(crate) devices: Vec<PlannedDevice>,
    /// Deviations from the manifest, such as rounded sizes; one sentence each.
    pub(crate) notes: Vec<String>,
}

impl ArchivePlan {
    /// Plans an archive of the devices and configurations in `manifest`.
    ///
    /// # Errors
    /// Fails if some known reader would refuse a name, a size or a configuration.
    pub(crate) fn new(manifest: &Manifest, options: &VmaOptions) -> Result<Self> {
        let mut notes = Vec::new();
        let devices = plan_devices(&manifest.devices, &mut notes)?;
        let mut attachments = manifest.attachments.clone();
        attachments.extend(guest_config(manifest, &mut notes));
        let configs = plan_configs(&attachments, &mut notes)?;
        let uuid = options.uuid.unwrap_or_else(|| derive_uuid(&devices, &configs, options.ctime));
        let header = encode_header(uuid, options.ctime, &devices, &configs)?;
        Ok(Self { uuid, header, devices, notes })
    }
}

/// Returns the configuration that `qmrestore` needs, for a machine that comes without one.
fn guest_config(manifest: &Manifest, notes: &mut Vec<String>) -> Option<Attachment> {
    let machine = manifest.machine.as_ref()?;
    let is_config = |config: &Attachment| config.name.rsplit('/').next() == Some(proxmox::CONFIG_NAME);
    if manifest.attachments.iter().any(is_config) {
        return None;
    }
    let printed = proxmox::for_archive(machine, &manifest.devices);
    notes.extend(printed.lost.iter().map(|line| format!("{} lacks {line}", proxmox::CONFIG_NAME)));
    Some(Attachment { name: proxmox::CONFIG_NAME.to_owned(), data: printed.text.into_bytes() })
}

/// Checks the devices, rounds their sizes, and numbers them from 1.
fn plan_devices(devices: &[Device], notes: &mut Vec<String>) -> Result<Vec<PlannedDevice>> {
    if devices.len() > usize::from(MAX_DEV_ID) {
        return Err(Error::limit(format!(
            "an archive holds at most {MAX_DEV_ID} devices, not {}",
            devices.len()
        )));
    }
    let mut names = HashSet::new();
    let mut planned = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        check_name(device)?;
        if !names.insert(device.name.as_str()) {
            return Err(Error::usage(format!("two devices are named '{}'", device.name))
                .device(&device.name)
                .remedied_by(Remedy::RenameDevice));
        }
        let size = planned_size(device)?;
        if size != device.size {
            notes.push(format!(
                "device {}: size rounded up from {} to {size} bytes (whole sectors); the tail is zero",
                device.name, device.size
            ));
        }
        planned.push(PlannedDevice {
            // Checked above: at most MAX_DEV_ID devices.
            dev_id: index as u8 + 1,
            name: device.name.clone(),
            size,
            is_state: device.name == VMSTATE_NAME,
            clusters: clusters_of(size),
        });
    }
    Ok(planned)
}

/// Returns the size in bytes of a device in the archive. Refuses a size that is unknown, 0 or above
/// [`MAX_DEVICE_SIZE`].
fn planned_size(device: &Device) -> Result<u64> {
    if device.open_ended {
        return Err(Error::unsupported("an archive can't begin before the size of every device is known")
            .device(&device.name)
            .hint("save the stream to a file first"));
    }
    if device.size == 0 {
        return Err(Error::unsupported("an archive can't hold a device of 0 bytes")
            .device(&device.name)
            .hint("leave it out"));
    }
    match device.size.checked_next_multiple_of(SECTOR) {
        Some(size) if size <= MAX_DEVICE_SIZE => Ok(size),
        _ => Err(Error::limit(format!("device size {} is above {MAX_DEVICE_SIZE}", device.size))
            .device(&device.name)
            .hint("cluster numbers have 32 bits, so an archive holds devices of up to 256 TiB")),
    }
}

/// Refuses a name that some known reader can't use in a file name, and guest state that is not called
/// [`VMSTATE_NAME`].
fn check_name(device: &Device) -> Result<()> {
    let name = &device.name;
    let refuse = |reason: &str| {
        Err(Error::usage(format!("the device name '{}' {reason}", escape_control(name)))
            .device(name)
            .remedied_by(Remedy::RenameDevice))
    };
    if name.is_empty() {
        return refuse("is empty");
    }
    if name.len() > MAX_NAME {
        return refuse(&format!("is {} bytes long; readers accept at most {MAX_NAME}", name.len()));
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        return refuse("has characters other than A-Z a-z 0-9 . _ -");
    }
    if (device.kind == DeviceKind::VmState) != (name == VMSTATE_NAME) && device.kind == DeviceKind::VmState {
        return refuse("must be 'vmstate', by which readers recognise guest state");
    }
    Ok(())
}

/// Checks the configurations, reduces their names to the last path component, and makes them unique.
fn plan_configs(attachments: &[Attachment], notes: &mut Vec<String>) -> Result<Vec<Attachment>> {
    if attachments.len() > TABLE_ENTRIES {
        return Err(Error::limit(format!(
            "an archive holds at most {TABLE_ENTRIES} configurations, not {}",
            attachments.len()
        )));
    }
    let mut names: HashSet<String> = HashSet::new();
    let mut planned = Vec::new();
    for attachment in attachments {
        let base = safe_component(&attachment.name)?;
        if attachment.data.len() > MAX_BLOB {
            return Err(Error::limit(format!(
                "configuration '{base}' has {} bytes; an archive holds at most {MAX_BLOB}",
                attachment.data.len()
            )));
        }
        let mut name = base.to_owned();
        let mut suffix = 2;
        while !names.insert(name.clone()) {
            name = format!("{base}.{suffix}");
            suffix += 1;
        }
        if name != attachment.name {
            notes.push(format!("configuration '{}' is stored as '{name}'", escape_control(&attachment.name)));
        }
        planned.push(Attachment { name, data: attachment.data.clone() });
    }
    Ok(planned)
}

/// Returns the last component of a path. Refuses a component that can't be a file name.
fn safe_component(name: &str) -> Result<&str> {
    let base = name.rsplit('/').next().unwrap_or(name);
    let reason = if base.is_empty() || base == "." || base == ".." {
        "is not a file name"
    } else if base.contains('\\') || base.chars().any(char::is_control) {
        "has characters that file names can't have"
    } else if base.len() > MAX_CONFIG_NAME {
        "is longer than 242 bytes, which readers can't extract"
    } else {
        return Ok(base);
    };
    Err(Error::usage(format!("the configuration name '{}' {reason}", escape_control(name)))
        .hint("rename the file, for example to qemu-server.conf"))
}

/// Derives a version 8 UUID from everything else in the header, so that equal input gives equal bytes.
fn derive_uuid(devices: &[PlannedDevice], configs: &[Attachment], ctime: i64) -> Uuid {
    let mut md5 = Md5::new();
    let mut feed = |bytes: &[u8]| {
        // The length before each field keeps different lists of fields distinct.
        md5.update((bytes.len() as u64).to_be_bytes());
        md5.update(bytes);
    };
    feed(b"imgtool vma");
    feed(&ctime.to_be_bytes());
    for device in devices {
        feed(device.name.as_bytes());
        feed(&device.size.to_be_bytes());
    }
    feed(b"configurations");
    for config in configs {
        feed(config.name.as_bytes());
        feed(&config.data);
    }
    uuid::Builder::from_custom_bytes(md5.finalize().into()).into_uuid()
}

/// The blob area of a header. Offset 0 means "none", so the first blob is at offset 1.
struct BlobArea(Vec<u8>);

impl BlobArea {
    /// Appends a blob of at most [`MAX_BLOB`] bytes and returns its offset in the area.
    fn push(&mut self, blob: &[u8]) -> Result<u32> {
        let position = u32::try_from(self.0.len()).ok();
        let (Some(position), Ok(len)) = (position, u16::try_from(blob.len())) else {
            return Err(Error::limit(format!("a blob of {} bytes is above {MAX_BLOB}", blob.len())));
        };
        self.0.extend_from_slice(&len.to_le_bytes());
        self.0.extend_from_slice(blob);
        Ok(position)
    }

    /// Appends a name with a terminating NUL and returns its offset in the area.
    fn push_name(&mut self, name: &str) -> Result<u32> {
        let mut blob = name.as_bytes().to_vec();
        blob.push(0);
        self.push(&blob)
    }
}

/// Encodes the whole header. Blobs are in the reference program's order: name and content of each
/// configuration, then the names of the devices.
fn encode_header(
    uuid: Uuid,
    ctime: i64,
    devices: &[PlannedDevice],
    configs: &[Attachment],
) -> Result<Vec<u8>> {
    let mut layout = HeaderLayout::new_zeroed();
    let mut blobs = BlobArea(vec![0]);
    let mut contents: BTreeMap<usize, (u32, u32)> = BTreeMap::new();
    for (index, config) in configs.iter().enumerate() {
        contents.insert(index, (blobs.push_name(&config.name)?, blobs.push(&config.data)?));
    }
    for (index, (name, data)) in contents {
        layout.config_names[index] = name.into();
        layout.config_data[index] = data.into();
    }
    for device in devices {
        let entry = &mut layout.dev_info[usize::from(device.dev_id)];
        entry.name_offset = blobs.push_name(&device.name)?.into();
        entry.device_size = device.size.into();
    }
    let BlobArea(blobs) = blobs;
    // At least one unit, because the blob area is never empty. The reference program refuses a header that
    // ends with the fixed part.
    let header_size = HEADER_FIXED + blobs.len().next_multiple_of(HEADER_UNIT);
    if header_size > MAX_HEADER_WRITTEN {
        return Err(Error::limit(format!(
            "names and configurations need a header of {header_size} bytes; readers accept at most {MAX_HEADER_WRITTEN}"
        ))
        .hint("leave out the largest configurations"));
    }
    layout.magic = MAGIC;
    layout.version = VERSION.into();
    layout.uuid = *uuid.as_bytes();
    layout.ctime = ctime.into();
    // The values are at most MAX_HEADER_WRITTEN, so the casts are lossless.
    layout.blob_buffer_offset = (HEADER_FIXED as u32).into();
    layout.blob_buffer_size = (blobs.len() as u32).into();
    layout.header_size = (header_size as u32).into();
    let mut raw = layout.as_bytes().to_vec();
    raw.extend_from_slice(&blobs);
    raw.resize(header_size, 0);
    let md5 = header_md5(&raw);
    raw[32..48].copy_from_slice(&md5);
    Ok(raw)
}
