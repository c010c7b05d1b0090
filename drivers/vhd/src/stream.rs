//! Reading a fixed image from a stream: its footer is known only at the end.

use std::sync::{Arc, Mutex};

use imgtool_core::source::second_pass;
use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Device, DeviceId, Doubt, Error, ImageInfo, ImageSource, Input, OpenOptions, Piece,
    Remedy, Result, Stream, StreamAccess,
};

use crate::image::{DISK, DISK_NAME, unverified};
use crate::layout::footer::{DiskType, FOOTER_LEN, Footer, footer_len, was_fixed};
use crate::layout::{Fault, SECTOR_SIZE};

/// Number of bytes read from a stream at a time. Our choice: 256 KiB fits into a core's cache.
const STREAM_PIECE: usize = 256 << 10;

/// Opens a stream as a fixed image.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let pass = Pass { salvage: options.salvage, ..Pass::new(input)? };
    let mut disk = Device::disk(DISK.0, DISK_NAME, 0);
    disk.open_ended = true;
    let mut info = ImageInfo { format: crate::FORMAT, devices: vec![disk], ..ImageInfo::default() };
    info.fact("subformat", "type", DiskType::Fixed.name());
    Ok(Arc::new(FixedStream { info, pass: Mutex::new(pass) }))
}

/// Reads a stream to its end, for a check.
///
/// # Errors
/// `Corrupt` if the stream does not end with the footer of the disk before it; any error of reading it.
pub(crate) fn read_through(input: Input) -> Result<()> {
    let mut pass = Pass::new(input)?;
    let pool = BufferPool::new();
    while pass.next_piece(&pool)?.is_some() {}
    Ok(())
}

/// A fixed image, read in one pass.
struct FixedStream {
    info: ImageInfo,
    pass: Mutex<Pass>,
}

/// State of the one pass over a stream.
struct Pass {
    stream: Stream,
    /// Guest offset of the first byte of `held`.
    start: u64,
    /// The last bytes read, at most [`FOOTER_LEN`]: the footer, if the stream ends here.
    held: Vec<u8>,
    /// Virtual size in bytes; `None` until the stream ends.
    final_size: Option<u64>,
    /// True once the caller has received the end of the stream.
    finished: bool,
    /// True to accept a stream that does not end with the footer of its disk.
    salvage: bool,
    /// Reason why a salvage can't prove the size of the disk.
    doubt: Option<String>,
}

impl ImageSource for FixedStream {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }

    fn doubts(&self) -> Vec<Doubt> {
        let doubt = lock(&self.pass).doubt.clone();
        doubt.into_iter().map(|reason| Doubt { device: DISK, reason }).collect()
    }
}

impl StreamAccess for Pass {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.finished {
            return Err(second_pass());
        }
        if self.final_size.is_some() {
            self.finished = true;
            return Ok(None);
        }
        let mut buffer = pool.take(STREAM_PIECE);
        let kept = self.held.len();
        buffer[..kept].copy_from_slice(&self.held);
        let filled = kept + self.stream.read_full(&mut buffer[kept..])?;
        let is_last = filled < STREAM_PIECE;
        let footer_len = if is_last { footer_len(self.start + filled as u64) } else { FOOTER_LEN };
        let mut guest_len = filled.saturating_sub(footer_len);
        self.held = buffer[guest_len..filled].to_vec();
        let start = self.start;
        if is_last {
            match self.check_footer(start + guest_len as u64) {
                Err(error) if self.salvage => guest_len = self.without_footer(&error, filled),
                checked => checked?,
            }
            self.final_size = Some(start + guest_len as u64);
        }
        self.start += guest_len as u64;
        if guest_len == 0 {
            self.finished = true;
            return Ok(None);
        }
        buffer.truncate(guest_len);
        Ok(Some(Piece::data(DISK, start, buffer)))
    }

    fn final_size(&self, _device: DeviceId) -> Option<u64> {
        self.final_size
    }
}

impl Pass {
    fn new(input: Input) -> Result<Self> {
        let stream = input.into_stream()?;
        Ok(Self {
            stream,
            start: 0,
            held: Vec::new(),
            final_size: None,
            finished: false,
            salvage: false,
            doubt: None,
        })
    }

    /// Takes what precedes a missing or damaged footer for the disk, as in a file. Returns how many of the
    /// `filled` last bytes of the stream belong to it.
    fn without_footer(&mut self, error: &Error, filled: usize) -> usize {
        let footer_len = if was_fixed(&self.padded()) { self.held.len() } else { 0 };
        let end = self.start + (filled - footer_len) as u64;
        let size = end - end % SECTOR_SIZE;
        self.doubt = Some(unverified(error, size));
        // The last piece begins at a sector.
        (size - self.start) as usize
    }

    /// Returns the last bytes, as long as a footer.
    fn padded(&self) -> Vec<u8> {
        let mut last = self.held.clone();
        last.resize(FOOTER_LEN, 0);
        last
    }

    /// Checks that the stream ends with the footer of a disk of `size` bytes, which is what was read.
    fn check_footer(&self, size: u64) -> Result<()> {
        let at = |error: Error| error.path(self.stream.location()).at(size);
        let salvage = |error: Error| {
            error.remedied_by(Remedy::Salvage("the stream was cut short, or is not a VHD image".into()))
        };
        let footer = Footer::decode(&self.padded()).map_err(|fault| match fault {
            Fault::NoSignature => at(salvage(Error::corrupt("the stream does not end with a VHD footer"))),
            Fault::Unsupported(what) => at(Error::unsupported(format!("the footer {what}"))),
            Fault::Malformed(what) => at(salvage(Error::corrupt(format!("the footer {what}")))),
        })?;
        if footer.disk_type != DiskType::Fixed {
            return Err(at(Error::corrupt(format!(
                "the footer describes a {} image, but the stream does not begin like one",
                footer.disk_type.name()
            ))));
        }
        let found = footer.current_size;
        if found == size {
            return Ok(());
        }
        let error = Error::corrupt(format!(
            "the disk has {found} bytes, but the stream had {size} before the footer"
        ));
        Err(at(if found < size {
            error.hint("save the stream to a file first: its footer tells the size")
        } else {
            salvage(error)
        }))
    }
}
