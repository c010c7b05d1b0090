//! Files below a file on overlayfs.
//!
//! A file of an overlay and the file of the layer that stores it have different device and inode numbers,
//! although they are one. The options of the mount name the directories of the layers.

use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::super::OverlayFiles;
use super::file_system_magic;

/// Magic number of overlayfs (statfs(2)).
const OVERLAYFS: u64 = 0x794c_7630;

/// Maximum depth of overlays on overlays. The kernel's limit (FILESYSTEM_MAX_STACK_DEPTH) is 2.
const MAX_DEPTH: usize = 3;

/// Returns the files that store the file at `path`, which `meta` describes, if it is on overlayfs.
pub fn overlay_files(meta: &Metadata, path: &Path) -> OverlayFiles {
    files_at(meta, path, MAX_DEPTH)
}

fn files_at(meta: &Metadata, path: &Path, depth: usize) -> OverlayFiles {
    let is_overlay = rustix::fs::statfs(path).is_ok_and(|fs| file_system_magic(&fs) == OVERLAYFS);
    if !meta.is_file() || !is_overlay {
        return OverlayFiles { files: Vec::new(), is_complete: true };
    }
    match (depth, mount_of(path)) {
        (1.., Some((mount, place))) => mount.files(meta, &place, depth - 1),
        _ => OverlayFiles { files: Vec::new(), is_complete: false },
    }
}

/// Returns the overlay that contains `path`, and the path within it.
fn mount_of(path: &Path) -> Option<(OverlayMount, PathBuf)> {
    let statx = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
    // Linux before 5.8 does not report the mount.
    if statx.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        return None;
    }
    let real = std::fs::canonicalize(path).ok()?;
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    let line = table.split(|byte| *byte == b'\n').find(|line| {
        let id = line.split(|byte| *byte == b' ').next();
        id.and_then(|id| str::from_utf8(id).ok()?.parse().ok()) == Some(statx.stx_mnt_id)
    })?;
    OverlayMount::parse(line, &real)
}

/// The layers of a mounted overlay.
#[derive(Debug, PartialEq, Eq)]
struct OverlayMount {
    /// Directory that takes all writes; `None` if the overlay is read-only.
    upper: Option<PathBuf>,
    /// Directories below it, the topmost first.
    lower: Vec<PathBuf>,
}

impl OverlayMount {
    /// Parses a line of mountinfo (proc_pid_mountinfo(5)). Returns the overlay, and where the file at `real`
    /// is within it.
    fn parse(line: &[u8], real: &Path) -> Option<(Self, PathBuf)> {
        let mut fields = line.split(|byte| *byte == b' ');
        let [root, point] = [fields.nth(3)?, fields.next()?].map(|field| path_of(unescaped(field)));
        let mut after = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, options) = (after.next()?, after.nth(1)?);
        if kind != b"overlay" {
            return None;
        }
        // A bind mount shows a directory of the overlay, `root`.
        let place = root.strip_prefix("/").ok()?.join(real.strip_prefix(&point).ok()?);
        let mut mount = Self { upper: None, lower: Vec::new() };
        for option in options.split(|byte| *byte == b',') {
            let Some(at) = option.iter().position(|byte| *byte == b'=') else { continue };
            let value = unescaped(&option[at + 1..]);
            match &option[..at] {
                b"upperdir" => mount.upper = Some(path_of(value)),
                b"lowerdir" => mount.lower.extend(split_layers(&value)),
                b"lowerdir+" | b"datadir+" => mount.lower.push(path_of(value)),
                _ => {}
            }
        }
        Some((mount, place))
    }

    /// Returns the files that may store the file at `place`: those of this name in every layer. A lower one
    /// may hold the data of an upper one that has only attributes (metacopy).
    fn files(&self, meta: &Metadata, place: &Path, depth: usize) -> OverlayFiles {
        let mut found = OverlayFiles { files: Vec::new(), is_complete: true };
        let layers = self.upper.iter().map(|upper| (upper, true));
        for (layer, is_written) in layers.chain(self.lower.iter().map(|lower| (lower, false))) {
            // A relative path began in the directory of the program that mounted the overlay.
            found.is_complete &= layer.is_absolute() && layer.is_dir();
            let path = layer.join(place);
            let Some(below) = std::fs::symlink_metadata(&path).ok().filter(Metadata::is_file) else {
                continue;
            };
            let deeper = files_at(&below, &path, depth);
            found.is_complete &= deeper.is_complete;
            found.files.push((below, is_written));
            let deeper = deeper.files.into_iter();
            found
                .files
                .extend(deeper.map(|(below, is_deeper_written)| (below, is_written && is_deeper_written)));
        }
        // A directory that was renamed has another name in the layers below (redirect_dir), and other
        // directories may be mounted over the layers. The file that is shown has these attributes.
        let is_it = |top: &Metadata| {
            top.len() == meta.len() && (top.mtime(), top.mtime_nsec()) == (meta.mtime(), meta.mtime_nsec())
        };
        found.is_complete &= found.files.first().is_some_and(|(top, _)| is_it(top));
        found
    }
}

/// Splits the value of `lowerdir`: paths with ":" in between, or "::" before a layer of data alone. A "\"
/// precedes a ":" within a path.
fn split_layers(value: &[u8]) -> Vec<PathBuf> {
    let mut layers = vec![Vec::new()];
    let mut bytes = value.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b':' => layers.push(Vec::new()),
            byte => {
                let byte = if byte == b'\\' { bytes.next().unwrap_or(byte) } else { byte };
                layers.last_mut().map(|layer| layer.push(byte)).unwrap_or_default();
            }
        }
    }
    layers.into_iter().filter(|layer| !layer.is_empty()).map(path_of).collect()
}

/// Undoes the escapes of mountinfo: a backslash and three octal digits.
pub(super) fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let code = match (first, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        out.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    out
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn layers_and_place_come_from_the_line_of_the_mount() {
        let line = br"65 43 0:39 /sub /mnt/a\040b rw,relatime shared:1 - overlay overlay rw,lowerdir=/l\0541:/l\134:2::/data,upperdir=/u\040p,workdir=/w,redirect_dir=nofollow";
        let (mount, place) = OverlayMount::parse(line, Path::new("/mnt/a b/c/x")).unwrap();
        assert_eq!(mount.upper, Some(PathBuf::from("/u p")));
        assert_eq!(mount.lower, ["/l,1", "/l:2", "/data"].map(PathBuf::from));
        assert_eq!(place, Path::new("sub/c/x"));
    }

    #[test]
    fn appended_layers_are_read_too() {
        let line = b"65 43 0:39 / /mnt ro - overlay none ro,lowerdir+=/a,lowerdir+=/b:c,datadir+=/d";
        let (mount, place) = OverlayMount::parse(line, Path::new("/mnt/x")).unwrap();
        assert_eq!((mount.upper, place), (None, PathBuf::from("x")));
        assert_eq!(mount.lower, ["/a", "/b:c", "/d"].map(PathBuf::from));
        assert_eq!(OverlayMount::parse(b"65 43 0:39 / /mnt ro - ext4 x rw", Path::new("/mnt/x")), None);
        assert_eq!(OverlayMount::parse(b"65 43 0:39", Path::new("/mnt/x")), None);
    }
}
