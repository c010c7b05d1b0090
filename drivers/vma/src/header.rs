//! The archive header, decoded and checked.

use std::collections::BTreeMap;
use std::ops::Range;

use imgtool_toolkit::{Attachment, Device, DeviceId, DeviceKind, Error, ErrorKind, Input, Result};
use uuid::Uuid;
use zerocopy::FromBytes;

use crate::bytes::{ArchiveBytes, Cursor};
use crate::layout::{
    HEADER_FIXED, HeaderLayout, MAGIC, MAX_DEV_ID, MAX_DEVICE_SIZE, MAX_HEADER_READ, TABLE_ENTRIES, VERSION,
    VMSTATE_NAME, header_md5,
};

/// Bytes of a header that are read at a time: a hostile size costs no more than what is there.
const READ_CHUNK: usize = 256 * 1024;

/// Bytes of a name that are kept. Ours: a name has no bound but that of a blob, 64 KiB, and all entries
/// may share one blob, so that a small archive could be 500 names of 64 KiB. No file is called so, and
/// QEMU's own names end here, too.
const MAX_NAME: usize = 1023;

/// What to do about a damaged header.
const DAMAGED: &str = "the archive is damaged at its start, or was cut: copy it again, or use another backup";

/// What an archive says about itself before its first extent.
#[derive(Debug, Clone)]
pub struct ArchiveHeader {
    /// Repeated in every extent.
    pub uuid: Uuid,
    /// When the archive was made, seconds since 1970.
    pub ctime: i64,
    /// Where the first extent begins, bytes.
    pub header_size: u32,
    /// The devices, by ascending `dev_id` (1..=254), which is the [`DeviceId`].
    pub devices: Vec<Device>,
    /// The configurations, in the order of the table.
    pub configs: Vec<Attachment>,
    /// What the tables hold beyond that: one sentence each.
    pub notes: Vec<String>,
}

impl ArchiveHeader {
    /// Reads the header of an archive and nothing else.
    ///
    /// # Errors
    /// When it can't be read, breaks a rule of the format, or is longer than
    /// [`MAX_HEADER_READ`].
    pub fn read(input: Input) -> Result<Self> {
        if input.is_stream() {
            Self::from_bytes(&mut input.into_stream()?)
        } else {
            Self::from_bytes(&mut Cursor::new(input.into_random()?))
        }
    }

    pub(crate) fn from_bytes(bytes: &mut impl ArchiveBytes) -> Result<Self> {
        Self::parse(&read_raw(bytes)?)
    }

    /// Reads a header for salvage: of one that is damaged what can be made out, with what is wrong.
    ///
    /// # Errors
    /// Those of [`ArchiveHeader::read`], when not even one device can be made out.
    pub(crate) fn salvage(bytes: &mut impl ArchiveBytes) -> Result<(Self, Option<Error>)> {
        let raw = read_raw(bytes)?;
        let error = match Self::parse(&raw) {
            Ok(header) => return Ok((header, None)),
            Err(error) => error,
        };
        let is_damage = matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed);
        match Self::make_out(&raw) {
            Some(header) if is_damage && !header.devices.is_empty() => Ok((header, Some(error))),
            _ => Err(error),
        }
    }

    /// What a damaged header still tells: every entry counts that could be one. Devices without a
    /// name are only taken where no name is left, so that no device is made of noise.
    fn make_out(raw: &[u8]) -> Option<Self> {
        let (layout, _) = HeaderLayout::ref_from_prefix(raw).ok()?;
        let blobs = Blobs::locate(layout, raw).ok();
        let blobs = blobs.as_ref();
        let mut header = Self::empty(layout);
        for is_named in [true, false] {
            for (index, entry) in (0u32..).zip(&layout.dev_info).take(TABLE_ENTRIES - 1).skip(1) {
                let name = match blobs.and_then(|blobs| blobs.text(entry.name_offset.get())) {
                    Some(name) if is_named => name,
                    None if !is_named => format!("device-{index}"),
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
                header.configs.push(Attachment { name, data: data.to_vec() });
            }
        }
        Some(header)
    }

    /// Without devices and configurations.
    fn empty(layout: &HeaderLayout) -> Self {
        Self {
            uuid: Uuid::from_bytes(layout.uuid),
            ctime: layout.ctime.get(),
            header_size: layout.header_size.get(),
            devices: Vec::new(),
            configs: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Checks and decodes a whole header. `raw` holds what the size field says, at least the fixed
    /// part.
    fn parse(raw: &[u8]) -> Result<Self> {
        let Ok((layout, _)) = HeaderLayout::ref_from_prefix(raw) else {
            return Err(Error::corrupt("can't read vma header - got EOF").hint(DAMAGED));
        };
        if layout.md5 != header_md5(raw) {
            return Err(Error::corrupt("wrong vma header checksum").at(32).hint(DAMAGED));
        }
        if layout.version.get() != VERSION {
            return Err(Error::unsupported(format!(
                "wrong vma version {}",
                layout.version.get().cast_signed()
            ))
            .at(4)
            .hint("only version 1 is known"));
        }
        let blobs = Blobs::locate(layout, raw)?;
        let mut header = Self::empty(layout);
        header.take_devices(layout, &blobs)?;
        header.take_configs(layout, &blobs)?;
        Ok(header)
    }

    fn take_devices(&mut self, layout: &HeaderLayout, blobs: &Blobs<'_>) -> Result<()> {
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
                    if blobs.is_cut(name_offset) {
                        self.notes.push(format!("the name of device {index} is cut after {MAX_NAME} bytes"));
                    }
                    self.add_device(index as u32, name, size)?;
                    continue;
                }
            };
            self.notes.push(format!("device entry {index} is ignored: {reason}"));
        }
        Ok(())
    }

    fn add_device(&mut self, index: u32, name: String, size: u64) -> Result<()> {
        if size > MAX_DEVICE_SIZE {
            return Err(Error::limit(format!(
                "device size {size} is above {MAX_DEVICE_SIZE}, the most that cluster numbers can address"
            ))
            .device(name)
            .at(4096 + u64::from(index) * 32 + 8)
            .hint("the header is wrong; no such device can be in this archive"));
        }
        if let Some(other) = self.devices.iter().find(|other| other.name == name) {
            self.notes.push(format!("devices {} and {index} have the same name", other.id));
        }
        let kind = if name == VMSTATE_NAME { DeviceKind::VmState } else { DeviceKind::Disk };
        self.devices.push(Device { id: DeviceId(index), name, size, open_ended: false, kind });
        Ok(())
    }

    fn take_configs(&mut self, layout: &HeaderLayout, blobs: &Blobs<'_>) -> Result<()> {
        for index in 0..TABLE_ENTRIES {
            let (name, data) = (layout.config_names[index].get(), layout.config_data[index].get());
            if name == 0 || data == 0 {
                if name != data {
                    self.notes.push(format!("configuration entry {index} is ignored: it is incomplete"));
                }
                continue;
            }
            if blobs.is_cut(name) {
                self.notes
                    .push(format!("the name of configuration entry {index} is cut after {MAX_NAME} bytes"));
            }
            let (Some(name), Some(data)) = (blobs.text(name), blobs.get(data)) else {
                return Err(Error::malformed("vma contains invalid data pointers")
                    .at(2044 + index as u64 * 4)
                    .hint(format!("the name or content of configuration entry {index} can't be found")));
            };
            if self.configs.iter().any(|other| other.name == name) {
                self.notes.push(format!("configuration entry {index} has the name of an earlier one"));
            }
            self.configs.push(Attachment { name, data: data.to_vec() });
        }
        Ok(())
    }

    /// The device with this id.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.iter().find(|device| device.id == id)
    }
}

/// Reads the header as far as its size field says.
fn read_raw(bytes: &mut impl ArchiveBytes) -> Result<Vec<u8>> {
    let mut raw = vec![0; HEADER_FIXED];
    let got = bytes.read_full(&mut raw)?;
    if got < HEADER_FIXED {
        let kind = if raw[..got.min(4)] == MAGIC[..got.min(4)] && got > 0 {
            ErrorKind::Corrupt
        } else {
            ErrorKind::WrongFormat
        };
        return Err(Error::new(kind, "can't read vma header - got EOF")
            .at(got as u64)
            .hint(format!("a header is at least {HEADER_FIXED} bytes long")));
    }
    if !raw.starts_with(&MAGIC) {
        return Err(Error::wrong_format("not a vma file - wrong magic number").at(0));
    }
    let Ok((layout, _)) = HeaderLayout::ref_from_prefix(&raw) else {
        return Err(Error::corrupt("can't read vma header - got EOF").hint(DAMAGED));
    };
    let header_size = layout.header_size.get();
    let wrong =
        |kind| Error::new(kind, format!("wrong vma header size {}", header_size.cast_signed())).at(56);
    if header_size as usize <= HEADER_FIXED {
        return Err(wrong(ErrorKind::Malformed).hint(format!("it must be above {HEADER_FIXED}")));
    }
    if header_size > MAX_HEADER_READ {
        return Err(wrong(ErrorKind::LimitExceeded)
            .hint(format!("at most {MAX_HEADER_READ} is read; real archives stay below 524288")));
    }
    while raw.len() < header_size as usize {
        let start = raw.len();
        let chunk = (header_size as usize - start).min(READ_CHUNK);
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

/// The blobs that the tables point to.
struct Blobs<'a> {
    area: &'a [u8],
    /// Blobs that are wanted, by their offset in the area.
    found: BTreeMap<u32, Range<usize>>,
}

impl<'a> Blobs<'a> {
    fn locate(layout: &HeaderLayout, raw: &'a [u8]) -> Result<Self> {
        let (offset, size) = (layout.blob_buffer_offset.get(), layout.blob_buffer_size.get());
        if (offset as usize) < HEADER_FIXED {
            return Err(Error::malformed(format!("wrong vma blob buffer offset {}", offset.cast_signed()))
                .at(48)
                .hint(format!("it must be at least {HEADER_FIXED}")));
        }
        // Both are below 2^32, so their sum can't wrap in 64 bits.
        let end = u64::from(offset) + u64::from(size);
        let area = usize::try_from(end).ok().and_then(|end| raw.get(offset as usize..end));
        let Some(area) = area else {
            return Err(Error::malformed(format!(
                "wrong vma blob buffer size {}/{}",
                offset.cast_signed(),
                size.cast_signed()
            ))
            .at(52)
            .hint(format!("the blobs must end within the header of {} bytes", raw.len())));
        };
        let pointers = layout
            .dev_info
            .iter()
            .map(|entry| entry.name_offset.get())
            .chain(layout.config_names.iter().chain(&layout.config_data).map(|pointer| pointer.get()));
        let mut blobs = Self { area, found: pointers.map(|pointer| (pointer, 0..0)).collect() };
        blobs.scan();
        Ok(blobs)
    }

    /// Walks over all blobs and keeps where those are that are wanted. A blob that leaves the area
    /// does not count.
    fn scan(&mut self) {
        let mut starts = BTreeMap::new();
        let mut position = 1;
        while let Some([low, high]) = self.area.get(position..).and_then(|rest| rest.first_chunk::<2>()) {
            let start = position + 2;
            let end = start + usize::from(u16::from_le_bytes([*low, *high]));
            if end <= self.area.len()
                && let Ok(pointer) = u32::try_from(position)
                && self.found.contains_key(&pointer)
            {
                starts.insert(pointer, start..end);
            }
            position = end;
        }
        self.found = starts;
    }

    fn get(&self, pointer: u32) -> Option<&'a [u8]> {
        self.found.get(&pointer).map(|range| &self.area[range.clone()])
    }

    /// A name, as far as it is kept.
    fn text(&self, pointer: u32) -> Option<String> {
        let name = self.name(pointer)?;
        let kept = match name.get(..MAX_NAME) {
            // No character is cut in two.
            Some(front) => front.utf8_chunks().next().map_or(front, |chunk| match chunk.invalid().len() {
                1..=3 if chunk.valid().len() + chunk.invalid().len() == front.len() => {
                    chunk.valid().as_bytes()
                }
                _ => front,
            }),
            None => name,
        };
        Some(String::from_utf8_lossy(kept).into_owned())
    }

    /// Whether a name is longer than what is kept of it.
    fn is_cut(&self, pointer: u32) -> bool {
        self.name(pointer).is_some_and(|name| name.len() > MAX_NAME)
    }

    /// A name: its last byte must be NUL, and it ends at its first. An empty blob has no last byte.
    fn name(&self, pointer: u32) -> Option<&'a [u8]> {
        let blob = self.get(pointer)?;
        if blob.last() != Some(&0) {
            return None;
        }
        blob.split(|&byte| byte == 0).next()
    }
}
