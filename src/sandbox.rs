//! Confinement of this process by the kernel: it limits the damage if an image exploits a flaw in a decoder.
//!
//! [`enter`] comes before anything of an image is read: from then on the process starts no program, has no
//! network unless a source is a URL, and writes only where the command line says. [`narrow`] comes when
//! everything is open: from then on it also opens only files in the directories of its outputs. Both do as
//! much as the kernel can, and nothing fails without it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use imgtool_core::Location;
use imgtool_engine::Reach;

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
use linux as platform;
#[cfg(not(target_os = "linux"))]
mod other;
#[cfg(not(target_os = "linux"))]
use other as platform;

/// True once the process is confined. A command that starts programs never is.
static ENTERED: AtomicBool = AtomicBool::new(false);

/// True once the process can open no other files.
static NARROWED: AtomicBool = AtomicBool::new(false);

/// True if the process may connect to servers of the internet, and to local sockets.
static INTERNET: AtomicBool = AtomicBool::new(false);
static LOCAL: AtomicBool = AtomicBool::new(false);

/// Sockets by which a process may connect to servers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Network {
    /// Those of the internet.
    pub internet: bool,
    /// Those of services on this machine, which have a path.
    pub local: bool,
}

/// Files that a command may write, besides temporary copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writes {
    /// Any file: the names of the outputs are not known yet.
    Anywhere,
    /// Files in or below these directories, and these files.
    Beneath(Vec<PathBuf>),
}

impl Writes {
    /// Permission for a command without outputs.
    pub fn nothing() -> Self {
        Self::Beneath(Vec::new())
    }

    /// Permission for a command that writes to `targets`, in a format with these options.
    pub fn to<'a>(targets: impl IntoIterator<Item = &'a Location>, options: &'a [(String, String)]) -> Self {
        // The data file of an image; relative to it, or to an image in the directory `target`.
        let names = || options.iter().filter(|(key, _)| key == "data_file").map(|(_, name)| name);
        let data_files = |target: &'a Path| {
            let directories = [target.parent().unwrap_or(target), target];
            names().flat_map(move |name| directories.map(|directory| directory.join(name)))
        };
        let targets = targets.into_iter().filter_map(Location::path);
        let paths = targets.flat_map(|target| data_files(target).chain([target.to_owned()]));
        Self::Beneath(paths.flat_map(|path| beneath(&path)).collect())
    }
}

/// Lets the process connect to servers, for a command whose sources are URLs. Comes before [`enter`].
pub fn permit(network: Network) {
    INTERNET.store(network.internet, Ordering::Relaxed);
    LOCAL.store(network.local, Ordering::Relaxed);
}

/// Confines the process before it reads an image. Threads that exist already stay unconfined.
pub fn enter(writes: Writes) {
    let writable = match writes {
        Writes::Anywhere => None,
        Writes::Beneath(mut paths) => {
            // Copies of streams that must be read by position.
            paths.push(std::env::temp_dir());
            Some(paths)
        }
    };
    let network =
        Network { internet: INTERNET.load(Ordering::Relaxed), local: LOCAL.load(Ordering::Relaxed) };
    platform::enter(writable.as_deref(), network);
    ENTERED.store(true, Ordering::Relaxed);
}

/// Confines the process further when all sources and outputs are open. Does nothing without [`enter`].
pub fn narrow(reach: &Reach) {
    if ENTERED.load(Ordering::Relaxed) && platform::narrow(reach) {
        NARROWED.store(true, Ordering::Relaxed);
    }
}

/// True if the kernel refuses files outside of the reach that [`narrow`] has set.
pub fn is_narrowed() -> bool {
    NARROWED.load(Ordering::Relaxed)
}

/// Describes what the kernel enforces, for `--version`.
pub fn describe() -> String {
    match platform::enforced().as_slice() {
        [] => "confinement: none, this system does not support it\n".to_owned(),
        parts => format!("confinement: {}\n", parts.join(", ")),
    }
}

/// Returns the paths that the output `path` needs: its directory or, if that does not exist yet, the nearest
/// one that does; the output itself if it exists.
fn beneath(path: &Path) -> Vec<PathBuf> {
    // A link is followed to its target, which is replaced there. A link that leads nowhere is refused later.
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let directory = path.ancestors().skip(1).map(or_current).find(|path| path.is_dir());
    if path.is_dir() {
        return vec![path];
    }
    // A device or pipe is never replaced, so its directory stays closed.
    let replaced = std::fs::metadata(&path).map_or(true, |meta| meta.is_file());
    directory.filter(|_| replaced).into_iter().chain(path.exists().then_some(path)).collect()
}

/// Replaces the empty path, the parent of a bare name, by the current directory.
fn or_current(path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { PathBuf::from(".") } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_directories_open_the_nearest_one() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(beneath(&dir.path().join("a/b/c.raw")), [dir.path().to_owned()]);
        assert_eq!(beneath(Path::new("no-such-file.raw")), [PathBuf::from(".")]);
    }

    #[test]
    fn existing_files_open_their_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("a.raw");
        std::fs::write(&file, "").expect("write");
        assert_eq!(beneath(&file), [dir.path().to_owned(), file]);
        assert_eq!(beneath(dir.path()), [dir.path().to_owned()]);
    }

    #[test]
    fn devices_do_not_open_their_directory() {
        assert_eq!(beneath(Path::new("/dev/null")), [PathBuf::from("/dev/null")]);
    }

    #[test]
    fn links_open_the_directory_of_their_target() {
        let dir = tempfile::tempdir().expect("a directory");
        let elsewhere = dir.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).expect("create");
        std::fs::write(elsewhere.join("a.raw"), "").expect("write");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("elsewhere/a.raw", &link).expect("link");
        assert_eq!(beneath(&link), [elsewhere.clone(), elsewhere.join("a.raw")]);
    }
}
