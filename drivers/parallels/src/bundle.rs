//! The descriptor of a bundle: a directory with the files of one disk, which `DiskDescriptor.xml` lists.
//!
//! A file of a bundle does not tell that it is only a part of the disk. The descriptor does: it lists a `Storage`
//! for each part of a split disk, and a `Shot` for each snapshot and for the current state.

use std::io;

use imgtool_core::{Error, ErrorKind, Externals, Input, Location};
use quick_xml::Reader;
use quick_xml::events::Event;

/// File name of the descriptor.
const NAME: &str = "DiskDescriptor.xml";
/// Maximum length in bytes of a descriptor. Our limit: a snapshot takes about 200 bytes.
const MAX_LEN: u64 = 1 << 20;
/// Maximum depth of the elements. Our limit: descriptors have 5.
const MAX_DEPTH: usize = 64;

/// Numbers of the files that make up a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bundle {
    /// Number of files that each store a range of the disk.
    storages: u64,
    /// Number of snapshots, the current state included.
    shots: u64,
}

impl Bundle {
    /// Reads the descriptor in the directory of the image at `image`, and says why the image is not known to
    /// be a whole disk: it is one of several files, or the descriptor can't be read. `None` if it is one, and
    /// without a descriptor or the permission to open it: the image is then read alone.
    pub(crate) fn doubt(image: &Location, externals: &Externals) -> Option<String> {
        let input = externals.open_part("descriptor", NAME, image).and_then(Input::into_random);
        let is_absent = |error: &Error| {
            error.kind() == ErrorKind::Refused
                || error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let read = match input {
            Err(error) if is_absent(&error) => return None,
            Err(error) => Err(error),
            Ok(input) if input.len() > MAX_LEN => {
                Err(Error::limit(format!("it has {} bytes, more than {MAX_LEN}", input.len())))
            }
            // At most 1 MiB.
            Ok(input) => input.read_vec(0, input.len() as usize),
        };
        match read.map(|bytes| Self::parse(&bytes)) {
            Ok(Some(bundle)) => bundle
                .others()
                .map(|others| format!("the file is one of a bundle with {others}, and not the whole disk")),
            Ok(None) => {
                Some(format!("{NAME} beside the file is damaged: the file may be a part of the disk"))
            }
            Err(error) => Some(format!(
                "{NAME} beside the file can't be read ({error:#}): the file may be a part of the disk"
            )),
        }
    }

    fn parse(descriptor: &[u8]) -> Option<Self> {
        let mut reader = Reader::from_reader(descriptor);
        let mut bundle = Self { storages: 0, shots: 0 };
        let (mut depth, mut seen) = (0_usize, false);
        loop {
            let (element, opens) = match reader.read_event().ok()? {
                Event::Start(element) => (element, true),
                Event::Empty(element) => (element, false),
                Event::End(_) => {
                    depth = depth.saturating_sub(1);
                    continue;
                }
                Event::Eof if depth == 0 && seen => return Some(bundle),
                Event::Eof => return None,
                _ => continue,
            };
            seen = true;
            depth += usize::from(opens);
            if depth > MAX_DEPTH {
                return None;
            }
            match element.local_name().as_ref() {
                "Storage" => bundle.storages += 1,
                "Shot" => bundle.shots += 1,
                _ => {}
            }
        }
    }

    /// Describes the other files of the disk ("2 parts and 3 snapshots"); `None` if each file is a whole disk.
    pub(crate) fn others(self) -> Option<String> {
        match (self.storages > 1, self.shots > 1) {
            (false, false) => None,
            (true, false) => Some(format!("{} parts", self.storages)),
            (false, true) => Some(format!("{} snapshots", self.shots)),
            (true, true) => Some(format!("{} parts and {} snapshots", self.storages, self.shots)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn others(descriptor: &str) -> Option<String> {
        Bundle::parse(descriptor.as_bytes()).and_then(Bundle::others)
    }

    #[test]
    fn counts_parts_and_snapshots() {
        let one = "<Parallels_disk_image Version=\"1.0\"><StorageData><Storage><Start>0</Start></Storage>\
                   </StorageData><Snapshots><TopGUID>{1}</TopGUID><Shot/></Snapshots></Parallels_disk_image>";
        assert_eq!(others(one), None);
        assert_eq!(others(&one.replace("<Shot/>", "<Shot/><Shot></Shot>")).as_deref(), Some("2 snapshots"));
        let split = one.replace("<StorageData>", "<StorageData><Storage/>");
        assert_eq!(others(&split).as_deref(), Some("2 parts"));
        let both = split.replace("<Shot/>", "<Shot/><Shot/>");
        assert_eq!(others(&both).as_deref(), Some("2 parts and 2 snapshots"));
    }

    #[test]
    fn ignores_what_is_no_descriptor() {
        for text in ["", "text", "<a", "<a></b>", &"<Storage>".repeat(1000)] {
            assert_eq!(others(text), None, "{text:.20}");
        }
    }
}
