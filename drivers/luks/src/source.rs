//! Reading containers: sectors are decrypted by the threads that read them.

use std::ops::Range;

use imgtool_core::source::uniform_extent;
use imgtool_core::{
    Access, Device, DeviceId, Doubt, Error, ErrorKind, Extent, ExtentKind, ImageInfo, ImageSource, Input,
    Loss, Losses, OpenOptions, RandomAccess, RandomInput, Remedy, Result,
};
use imgtool_crypt::{HEADER_LEN, Header, SECTOR, SectorCipher, in_sectors};

/// Name of the format in which a container is copied without being opened.
const VERBATIM: &str = "raw";

/// The id of a container's only device.
const DISK: DeviceId = DeviceId(0);

/// Length in bytes at which reads are cheapest: a page.
const GRANULE: u64 = 4096;

/// An open container.
pub(crate) struct LuksSource {
    info: ImageInfo,
    input: RandomInput,
    /// Position of the content in the file.
    start: u64,
    /// `None` if the caller reads no content.
    cipher: Option<SectorCipher>,
    /// Guest ranges that salvage could not recover; `None` without salvage.
    losses: Option<Losses>,
    /// Reason why a salvage can't prove that nothing is missing.
    doubt: Option<String>,
}

/// Says that a container ends within a sector, which has `rest` bytes.
fn cut(rest: u64) -> String {
    format!(
        "the last {rest} bytes of the file are no whole sector and can't be decrypted: the container is cut"
    )
}

impl LuksSource {
    /// Opens a container.
    ///
    /// # Errors
    /// Those of [`Header::parse`] and [`Header::unlock`].
    pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Self> {
        let input = input.into_random()?;
        let header = Header::parse(&input.read_head(HEADER_LEN)?).map_err(refer_to_raw)?;
        let start = header.payload_offset;
        let size = content_len(&input, start)?;
        let rest = size % SECTOR as u64;
        if rest > 0 && !options.salvage && !options.info_only {
            return Err(Error::corrupt(cut(rest)).at(input.len() - rest).remedied_by(Remedy::Salvage(
                "the container is cut short: copy it again, or use a backup".into(),
            )));
        }
        let wants_content = !options.info_only && !options.layout_only;
        if wants_content && options.secrets.is_empty() {
            return Err(Error::refused("the container is encrypted (LUKS)")
                .remedied_by(Remedy::GiveSecretOrReadAs { format: VERBATIM }));
        }
        let cipher = wants_content
            .then(|| header.unlock(&input, 0..start, &options.secrets, &options.memory))
            .transpose()?;
        let device = Device::disk(DISK.0, "disk", size - rest);
        let mut info = ImageInfo { format: crate::FORMAT, devices: vec![device], ..ImageInfo::default() };
        describe(&mut info, &header);
        if rest > 0 {
            info.notes.push(cut(rest));
        }
        let doubt = (rest > 0).then(|| format!("unverified: {}", cut(rest)));
        Ok(Self { info, input, start, cipher, losses: options.salvage.then(Losses::default), doubt })
    }
}

/// Adds to the error of an unknown version that its bytes can be copied as they are.
pub(crate) fn refer_to_raw(error: Error) -> Error {
    if error.kind() != ErrorKind::Unsupported {
        return error;
    }
    let advice = "cryptsetup opens it as a device, which can be converted".into();
    error.remedied_by(Remedy::ReadAs { format: VERBATIM, advice })
}

/// Returns the length in bytes of the content from `start` on.
pub(crate) fn content_len(input: &RandomInput, start: u64) -> Result<u64> {
    if start == 0 {
        return Err(Error::unsupported("the header is detached: the content is in another file")
            .at(104)
            .hint("open both with cryptsetup, and convert the device"));
    }
    input.len().checked_sub(start).ok_or_else(|| {
        let len = input.len();
        Error::corrupt(format!("the content starts at offset {start}, beyond the end of the file at {len}"))
            .at(104)
            .hint("the file is cut short: copy it again, or use a backup")
    })
}

/// Adds the facts of `qemu-img info`.
fn describe(info: &mut ImageInfo, header: &Header) {
    info.top_fact("encrypted", "encrypted", true);
    for (key, value) in header.facts() {
        // The keys are those of `Header::facts`.
        if let Some(key) = imgtool_crypt::FACTS.iter().find(|known| **known == key) {
            info.fact(key, key, value);
        }
    }
}

impl ImageSource for LuksSource {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        self.losses.as_ref().map(|losses| losses.list(DISK)).unwrap_or_default()
    }

    fn doubts(&self) -> Vec<Doubt> {
        self.doubt.iter().map(|reason| Doubt { device: DISK, reason: reason.clone() }).collect()
    }
}

impl RandomAccess for LuksSource {
    /// Returns data only: a hole of the file decrypts to noise.
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        Ok(uniform_extent(range, ExtentKind::Data))
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let cipher = self
            .cipher
            .as_ref()
            .ok_or_else(|| Error::usage("the container was opened without its content"))?;
        in_sectors(buf, guest_offset, |sectors, guest| {
            let (position, number) = (self.start + guest, guest / SECTOR as u64);
            let Some(losses) = &self.losses else {
                return cipher.read(&self.input, sectors, position, number, None);
            };
            let mut lost = |lost: Range<usize>, e: Error| {
                losses.add(guest + lost.start as u64..guest + lost.end as u64, &e);
            };
            cipher.read(&self.input, sectors, position, number, Some(&mut lost))
        })
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        GRANULE.max(self.input.granule())
    }

    fn reader_memory(&self, _device: DeviceId) -> u64 {
        self.input.granule()
    }
}
