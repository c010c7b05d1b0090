//! Salvage of a package that was cut: its missing members, and its streams without tables.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Device, DeviceId, Disk, ImageSource, Input, Loss, LossClass, OpenOptions, Piece,
    Result,
};

use crate::disks::PackagedDisk;

/// Returns an image as a disk that is read by position, and what is lost of it: an image that can only be
/// read in one pass, such as a VMDK without its tables, is unpacked to temporary storage.
///
/// # Errors
/// If the image can't be unpacked.
pub(crate) fn by_position(image: Arc<dyn ImageSource>, options: &OpenOptions) -> Result<(Disk, Vec<Loss>)> {
    const WHAT: &str = "a file in a package";
    if !image.access().is_stream() {
        return Ok((Disk::only(image, WHAT)?, Vec::new()));
    }
    let device = image.info().single(WHAT)?.clone();
    let unpacked =
        Unpacked { image: Arc::clone(&image), device, pool: BufferPool::new(), piece: None, position: 0 };
    let bytes =
        Input::from_reader("", Box::new(unpacked)).and_then(|input| options.externals.saved(input))?;
    let raw = options.externals.open_member(bytes, Some("raw"), options)?;
    Ok((Disk::only(raw, WHAT)?, image.losses()))
}

/// Returns a disk whose file is missing: all of it is lost.
pub(crate) fn lost(id: u32, name: &str, size: u64, reason: String) -> PackagedDisk {
    let device = Device::disk(id, name, size);
    let losses = vec![loss(id, 0..size, reason)];
    PackagedDisk { device, disk: None, files: Vec::new(), notes: Vec::new(), losses }
}

/// Returns the loss of a range of a disk.
pub(crate) fn loss(id: u32, guest: Range<u64>, reason: String) -> Loss {
    let (offset, compressed_offset, device) = (None, None, DeviceId(id));
    Loss { class: LossClass::Lost, offset, compressed_offset, device, guest, reason }
}

/// Records that an archive was cut within the member `cut`: its disk, or else the last one, can't be proven complete,
/// since further ones may have followed.
pub(crate) fn mark_cut<'d>(disks: impl IntoIterator<Item = &'d mut PackagedDisk>, cut: Option<String>) {
    let Some(cut) = cut else { return };
    let mut marked = None;
    for disk in disks {
        let is_cut = disk.files.iter().any(|file| file.name == cut);
        marked = Some(disk);
        if is_cut {
            break;
        }
    }
    if let Some(disk) = marked {
        let (id, size) = (disk.device.id.0, disk.device.size);
        disk.losses.push(loss(id, size..size, "the archive was cut, here or behind this disk".to_owned()));
    }
}

/// The bytes of the disk in a stream.
struct Unpacked {
    image: Arc<dyn ImageSource>,
    device: Device,
    pool: BufferPool,
    piece: Option<Piece>,
    /// Guest offset of the next byte.
    position: u64,
}

impl Unpacked {
    /// Returns the piece with the next byte; `None` at the end.
    fn piece(&mut self) -> io::Result<Option<&Piece>> {
        while self.piece.as_ref().is_none_or(|piece| piece.end() <= self.position) {
            let Access::Stream(stream) = self.image.access() else { break };
            let next = lock(stream).next_piece(&self.pool).map_err(io::Error::other)?;
            let Some(piece) = next else { return Ok(None) };
            if piece.device != self.device.id {
                continue;
            }
            if piece.start != self.position {
                return Err(io::Error::other("the parts of the disk are out of order"));
            }
            self.piece = Some(piece);
        }
        Ok(self.piece.as_ref())
    }
}

impl Read for Unpacked {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let position = self.position;
        if position >= self.device.size {
            return Ok(0);
        }
        let Some(piece) = self.piece()? else { return Ok(0) };
        let len = usize::try_from(piece.end() - position).unwrap_or(usize::MAX).min(buf.len());
        match &piece.data {
            Some(data) => {
                // The piece has the position, and its data fit into memory.
                let start = usize::try_from(position - piece.start).map_err(io::Error::other)?;
                buf[..len].copy_from_slice(&data[start..start + len]);
            }
            None => buf[..len].fill(0),
        }
        self.position += len as u64;
        Ok(len)
    }
}
