//! Decoding of the archive header.

use std::collections::BTreeMap;
use std::ops::Range;

use imgtool_core::{Attachment, Device, DeviceId, DeviceKind, Error, ErrorKind, Input, Result};
use uuid::Uuid;
use zerocopy::FromBytes;

use crate::bytes::{ArchiveBytes, FileCursor};
use crate::device_ids::DeviceIds;
use crate::layout::{
    HEADER_FIXED, HeaderLayout, MAGIC, MAX_DEV_ID, MAX_DEVICE_SIZE, MAX_HEADER_READ, TABLE_ENTRIES, VERSION,
    VMSTATE_NAME, header_md5,
};
use crate::reference::{self, ChecksumMismatch};

/// Number of header bytes read at a time. Reading in chunks keeps a hostile `header_size` from allocating
/// much more memory than the file has bytes.
const HEADER_CHUNK: usize = 256 * 1024;

/// Maximum length in bytes of a name; the driver truncates longer names. Our limit: all table entries may
/// share one blob, so a small archive could otherwise yield 510 names of 64 KiB. QEMU limits the names of
/// backing files to the same length.
const MAX_NAME: usize = 1023;

/// Hint for a damaged header.
const DAMAGED: &str = "the archive is damaged at its start, or was cut: copy it again, or use another backup";

/// The decoded archive header: devices, configurations and identity of the archive.
#[derive(Debug, Clone)]
pub struct ArchiveHeader {
    /// UUID of the archive, repeated in every extent.
    pub uuid: Uuid,
    /// Creation time, in seconds since 1970.
    pub ctime: i64,
    /// Length in bytes of the header, which is also the archive offset of the first extent.
    pub header_size: u32,
    /// Devices in ascending order of `dev_id` (1 to 254), which is also their [`DeviceId`].
    pub devices: Vec<Device>,
    /// Configurations in the order of their table.
    pub configs: Vec<Attachment>,
    /// Notes for the user, for example about ignored table entries; one sentence each.
    pub notes: Vec<String>,
    /// Indices into `devices`, by id.
    pub(crate) ids: DeviceIds,
    /// Names of devices that are not UTF-8, as stored.
    raw_device_names: BTreeMap<DeviceId, Vec<u8>>,
    /// Names of configurations that are not UTF-8, as stored, by their index in `configs`.
    raw_config_names: BTreeMap<usize, Vec<u8>>,
}

/// A name in the archive header.
struct Name {
    /// The name with replaced bytes where it is not UTF-8.
    text: String,
    /// The name as stored, if it is not UTF-8.
    raw: Option<Vec<u8>>,
}

impl From<String> for Name {
    fn from(text: String) -> Self {
        Self { text, raw: None }
    }
}

impl ArchiveHeader {
    /// Reads the header of an archive and nothing else.
    ///
    /// # Errors
    /// Fails if the header can't be read, violates the format, or is longer than [`MAX_HEADER_READ`].
    pub fn read(input: Input) -> Result<Self> {
        if input.is_stream() {
            Self::read_from(&mut input.into_stream()?)
        } else {
            Self::read_from(&mut FileCursor::new(input.into_random()?))
        }
    }

    /// Reads the header from the start of an archive and leaves `bytes` directly after it.
    pub(crate) fn read_from(bytes: &mut impl ArchiveBytes) -> Result<Self> {
        Self::parse(&read_raw(bytes)?)
    }

    /// Like [`ArchiveHeader::read_from`], but decodes a damaged header as far as possible, and also returns
    /// the error that strict decoding reported.
    ///
    /// # Errors
    /// Fails if the header can't be read, if strict decoding fails for a reason other than damage, or if no
    /// device can be decoded from a damaged header.
    pub(crate) fn read_lenient(bytes: &mut impl ArchiveBytes) -> Result<(Self, Option<Error>)> {
        let raw = read_raw(bytes)?;
        let error = match Self::parse(&raw) {
            Ok(header) => return Ok((header, None)),
            Err(error) => error,
        };
        let is_damage = matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed);
        match Self::parse_lenient(&raw) {
            Some(header) if is_damage && !header.devices.is_empty() => Ok((header, Some(error))),
            _ => Err(error),
        }
    }

    /// Decodes a damaged header and keeps every plausible table entry. Keeps devices without a name only if
    /// no device has one, so that noise does not become a device.
    fn parse_lenient(raw: &[u8]) -> Option<Self> {
        let (layout, _) = HeaderLayout::ref_from_prefix(raw).ok()?;
        let blobs = Blobs::locate(layout, raw).ok();
        let blobs = blobs.as_ref();
        let mut header = Self::empty(layout);
        for is_named in [true, false] {
            for (index, entry) in (0u32..).zip(&layout.dev_info).take(TABLE_ENTRIES - 1).skip(1) {
                let name = match blobs.and_then(|blobs| blobs.text(entry.name_offset.get())) {
                    Some(name) if is_named => name,
                    None if !is_named => format!("device-{index}").into(),
                    _ => continue,
                };
                let size = entry.device_size.get();
                if (1..=MAX_DEVICE_SIZE).contains(&size) {
                    header.add_device(index, name, size).ok()?;
                }
            }
            if !header.devices.is_empty() {
                break;
            }
        }
        for (name, data) in layout.config_names.iter().zip(&layout.config_data) {
            let (name, data) = (name.get(), data.get());
            if name != 0
                && data != 0
                && let Some(blobs) = blobs
                && let (Some(name), Some(data)) = (blobs.text(name), blobs.get(data))
            {
                header.push_config(name, data);
            }
        }
        Some(header)
    }

    /// Returns a header with the fixed fields of `layout`, without devices and configurations.
    fn empty(layout: &HeaderLayout) -> Self {
        Self {
            uuid: Uuid::from_bytes(layout.uuid),
            ctime: layout.ctime.get(),
            header_size: layout.header_size.get(),
            devices: Vec::new(),
            configs: Vec::new(),
            notes: Vec::new(),
            ids: DeviceIds::default(),
            raw_device_names: BTreeMap::new(),
            raw_config_names: BTreeMap::new(),
        }
    }

    /// Returns the name of a device as the archive stores it, in any encoding.
    pub fn device_name<'a>(&'a self, device: &'a Device) -> &'a [u8] {
        self.raw_device_names.get(&device.id).map_or(device.name.as_bytes(), Vec::as_slice)
    }

    /// Returns the name of the configuration at `index` of [`ArchiveHeader::configs`] as the archive stores
    /// it, in any encoding.
    pub fn config_name(&self, index: usize) -> &[u8] {
        let text = self.configs.get(index).map_or(&[][..], |config| config.name.as_bytes());
        self.raw_config_names.get(&index).map_or(text, Vec::as_slice)
    }

    fn push_config(&mut self, name: Name, data: &[u8]) {
        if let Some(raw) = name.raw {
            self.raw_config_names.insert(self.configs.len(), raw);
        }
        self.configs.push(Attachment { name: name.text, data: data.to_vec() });
    }

    /// Checks and decodes a whole header. `raw` must be `header_size` bytes long and contain the fixed part.
    fn parse(raw: &[u8]) -> Result<Self> {
        let Ok((layout, _)) = HeaderLayout::ref_from_prefix(raw) else {
            return Err(Error::corrupt(reference::HEADER_EOF).hint(DAMAGED));
        };
        if layout.md5 != header_md5(raw) {
            return Err(ChecksumMismatch::ArchiveHeader.error().at(32).hint(DAMAGED));
        }
        if layout.version.get() != VERSION {
            return Err(Error::unsupported(format!(
                "wrong vma version {}",
                layout.version.get().cast_signed()
            ))
            .at(4)
            .hint("only version 1 is supported: extract the archive with the program that made it"));
        }
        let blobs = Blobs::locate(layout, raw)?;
        let mut header = Self::empty(layout);
        header.add_devices(layout, &blobs)?;
        header.add_configs(layout, &blobs)?;
        Ok(header)
    }

    /// Adds the devices of the table, and notes about ignored entries and truncated or repeated names.
    fn add_devices(&mut self, layout: &HeaderLayout, blobs: &Blobs<'_>) -> Result<()> {
        for (index, entry) in layout.dev_info.iter().enumerate() {
            let (size, name_offset) = (entry.device_size.get(), entry.name_offset.get());
            if size == 0 && name_offset == 0 {
                continue;
            }
            let reason = match blobs.text(name_offset) {
                _ if index == 0 => "id 0 marks empty slots",
                _ if index > usize::from(MAX_DEV_ID) => "id 255 is reserved",
                _ if size == 0 => "its size is 0",
                None => "its name can't be found",
                Some(name) => {
                    if blobs.is_truncated(name_offset) {
                        self.notes
                            .push(format!("the name of device {index} is truncated to {MAX_NAME} bytes"));
                    }
                    self.add_device(index as u32, name, size)?;
                    continue;
                }
            };
            self.notes.push(format!("device entry {index} is ignored: {reason}"));
        }
        Ok(())
    }

    fn add_device(&mut self, index: u32, name: Name, size: u64) -> Result<()> {
        let Name { text: name, raw } = name;
        if size > MAX_DEVICE_SIZE {
            return Err(Error::limit(format!(
                "device size {size} is above {MAX_DEVICE_SIZE}, the maximum that cluster numbers can address"
            ))
            .device(name)
            .at(4096 + u64::from(index) * 32 + 8)
            .hint("no archive can hold such a device: the header is damaged; use another copy or backup"));
        }
        if let Some(other) = self.devices.iter().find(|other| other.name == name) {
            self.notes.push(format!("devices {} and {index} have the same name", other.id));
        }
        let kind = if name == VMSTATE_NAME { DeviceKind::VmState } else { DeviceKind::Disk };
        if let Some(raw) = raw {
            self.raw_device_names.insert(DeviceId(index), raw);
        }
        self.ids.push(DeviceId(index));
        self.devices.push(Device { id: DeviceId(index), name, size, open_ended: false, kind });
        Ok(())
    }

    /// Adds the configurations of the table, and notes about incomplete entries and truncated or repeated
    /// names.
    fn add_configs(&mut self, layout: &HeaderLayout, blobs: &Blobs<'_>) -> Result<()> {
        for index in 0..TABLE_ENTRIES {
            let (name, data) = (layout.config_names[index].get(), layout.config_data[index].get());
            if name == 0 || data == 0 {
                if name != data {
                    self.notes.push(format!("configuration entry {index} is ignored: it is incomplete"));
                }
                continue;
            }
            if blobs.is_truncated(name) {
                self.notes.push(format!(
                    "the name of configuration entry {index} is truncated to {MAX_NAME} bytes"
                ));
            }
            let (Some(name), Some(data)) = (blobs.text(name), blobs.get(data)) else {
                return Err(Error::malformed("vma contains invalid data pointers")
                    .at(2044 + index as u64 * 4)
                    .hint(format!(
                        "the name or content of configuration entry {index} can't be found; {DAMAGED}"
                    )));
            };
            if self.configs.iter().any(|other| other.name == name.text) {
                self.notes.push(format!("configuration entry {index} has the name of an earlier one"));
            }
            self.push_config(name, data);
        }
        Ok(())
    }

    /// Returns the device with this id, or `None` if the archive has no such device.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.get(self.ids.index_of(id)?)
    }
}

/// Reads the whole header, `header_size` bytes, and checks its magic number and size.
fn read_raw(bytes: &mut impl ArchiveBytes) -> Result<Vec<u8>> {
    let mut raw = vec![0; HEADER_FIXED];
    let got = bytes.read_full(&mut raw)?;
    if got < HEADER_FIXED {
        let kind = if raw[..got.min(4)] == MAGIC[..got.min(4)] && got > 0 {
            ErrorKind::Corrupt
        } else {
            ErrorKind::WrongFormat
        };
        return Err(Error::new(kind, reference::HEADER_EOF).at(got as u64).hint(format!(
            "a header is at least {HEADER_FIXED} bytes long: the file is cut short, or is not a VMA archive"
        )));
    }
    if !raw.starts_with(&MAGIC) {
        return Err(Error::wrong_format("not a vma file - wrong magic number").at(0));
    }
    let Ok((layout, _)) = HeaderLayout::ref_from_prefix(&raw) else {
        return Err(Error::corrupt(reference::HEADER_EOF).hint(DAMAGED));
    };
    let header_size = layout.header_size.get();
    let wrong =
        |kind| Error::new(kind, format!("wrong vma header size {}", header_size.cast_signed())).at(56);
    if header_size as usize <= HEADER_FIXED {
        return Err(wrong(ErrorKind::Malformed).hint(format!("it must be above {HEADER_FIXED}; {DAMAGED}")));
    }
    if header_size > MAX_HEADER_READ {
        return Err(wrong(ErrorKind::LimitExceeded).hint(format!(
            "at most {MAX_HEADER_READ} is supported; real archives stay below 524288; {DAMAGED}"
        )));
    }
    while raw.len() < header_size as usize {
        let start = raw.len();
        let chunk = (header_size as usize - start).min(HEADER_CHUNK);
        raw.resize(start + chunk, 0);
        let got = bytes.read_full(&mut raw[start..])?;
        if got < chunk {
            return Err(Error::corrupt("can't read vma header data - got EOF")
                .at((start + got) as u64)
                .hint(DAMAGED));
        }
    }
    Ok(raw)
}

/// Blobs that the tables point to.
struct Blobs<'a> {
    area: &'a [u8],
    /// Range of each blob's content in `area`. The key is the offset of the blob's length field in `area`.
    contents: BTreeMap<u32, Range<usize>>,
}

impl<'a> Blobs<'a> {
    /// Checks the bounds of the blob area and finds the blobs in it.
    fn locate(layout: &HeaderLayout, raw: &'a [u8]) -> Result<Self> {
        let (offset, size) = (layout.blob_buffer_offset.get(), layout.blob_buffer_size.get());
        if (offset as usize) < HEADER_FIXED {
            return Err(Error::malformed(format!("wrong vma blob buffer offset {}", offset.cast_signed()))
                .at(48)
                .hint(format!("it must be at least {HEADER_FIXED}; {DAMAGED}")));
        }
        // Both values are below 2^32, so their sum can't wrap in 64 bits.
        let end = u64::from(offset) + u64::from(size);
        let area = usize::try_from(end).ok().and_then(|end| raw.get(offset as usize..end));
        let Some(area) = area else {
            return Err(Error::malformed(format!(
                "wrong vma blob buffer size {}/{}",
                offset.cast_signed(),
                size.cast_signed()
            ))
            .at(52)
            .hint(format!("the blobs must end within the header of {} bytes; {DAMAGED}", raw.len())));
        };
        let pointers = layout
            .dev_info
            .iter()
            .map(|entry| entry.name_offset.get())
            .chain(layout.config_names.iter().chain(&layout.config_data).map(|pointer| pointer.get()));
        let mut blobs = Self { area, contents: pointers.map(|pointer| (pointer, 0..0)).collect() };
        blobs.scan();
        Ok(blobs)
    }

    /// Walks over all blobs and records each one that a table points to. Ignores a blob that ends past the
    /// area.
    fn scan(&mut self) {
        let mut starts = BTreeMap::new();
        let mut position = 1;
        while let Some([low, high]) = self.area.get(position..).and_then(|rest| rest.first_chunk::<2>()) {
            let start = position + 2;
            let end = start + usize::from(u16::from_le_bytes([*low, *high]));
            if end <= self.area.len()
                && let Ok(pointer) = u32::try_from(position)
                && self.contents.contains_key(&pointer)
            {
                starts.insert(pointer, start..end);
            }
            position = end;
        }
        self.contents = starts;
    }

    /// Returns the content of the blob at `pointer`, or `None` if no blob begins there.
    fn get(&self, pointer: u32) -> Option<&'a [u8]> {
        self.contents.get(&pointer).map(|range| &self.area[range.clone()])
    }

    /// Returns the name at `pointer`, truncated to [`MAX_NAME`] bytes and with invalid UTF-8 replaced.
    /// Returns `None` if [`Blobs::name`] does.
    fn text(&self, pointer: u32) -> Option<Name> {
        let name = self.name(pointer)?;
        let kept = match name.get(..MAX_NAME) {
            // Drop a character that the limit cuts in two.
            Some(front) => front.utf8_chunks().next().map_or(front, |chunk| match chunk.invalid().len() {
                1..=3 if chunk.valid().len() + chunk.invalid().len() == front.len() => {
                    chunk.valid().as_bytes()
                }
                _ => front,
            }),
            None => name,
        };
        let text = String::from_utf8_lossy(kept);
        let raw = (text.as_bytes() != kept).then(|| kept.to_owned());
        Some(Name { text: text.into_owned(), raw })
    }

    /// True if the name at `pointer` is longer than [`MAX_NAME`].
    fn is_truncated(&self, pointer: u32) -> bool {
        self.name(pointer).is_some_and(|name| name.len() > MAX_NAME)
    }

    /// Returns the name at `pointer`, of any length. The name ends at the first NUL of its blob. Returns
    /// `None` if no blob begins there, or if the blob is empty or does not end with a NUL. The reference
    /// program reads out of bounds on an empty blob.
    fn name(&self, pointer: u32) -> Option<&'a [u8]> {
        let blob = self.get(pointer)?;
        if blob.last() != Some(&0) {
            return None;
        }
        blob.split(|&byte| byte == 0).next()
    }
}
