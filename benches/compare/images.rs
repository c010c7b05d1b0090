//! The images that are converted. Each is made when the first row needs it and removed behind the
//! last, so that a tmpfs need not hold them all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Guest size of the main image.
const VIRTUAL_SIZE: u64 = 4 << 30;

/// Bytes of files in it.
const FILES_LEN: u64 = 1400 << 20;

/// Guest size of the sparse image, what it holds, and how much of that stands together.
const SPARSE_SIZE: u64 = 1 << 40;
const SPARSE_DATA: u64 = 256 << 20;
const SPARSE_RUN: u64 = 64 << 10;

/// Guest size of the empty images.
const EMPTY_SIZE: u64 = 8 << 40;

/// Where images are made.
pub struct Images {
    dir: PathBuf,
    trees: Vec<PathBuf>,
}

impl Images {
    pub fn new(dir: PathBuf, trees: Vec<PathBuf>) -> Self {
        Self { dir, trees }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the image of this name if it is not there.
    pub fn make(&self, name: &str) -> Result<(), String> {
        let path = self.dir.join(name);
        if path.exists() {
            return Ok(());
        }
        eprintln!("making {name}");
        let imgtool = env!("CARGO_BIN_EXE_imgtool");
        let qemu = "qemu-img convert -W -m 16 -f raw -O qcow2";
        match name {
            "a.raw" => self.file_system(&path),
            "sparse.raw" => sparse(&path),
            "empty.raw" => set_len(&path, EMPTY_SIZE),
            "a.qcow2" => self.derive(&format!("{qemu} a.raw a.qcow2")),
            "a.vhdx" => self.derive("qemu-img convert -f raw -O vhdx a.raw a.vhdx"),
            "z.qcow2" => self.derive(&format!("{qemu} -c a.raw z.qcow2")),
            "s.qcow2" => self.derive(&format!("{qemu} -c -o compression_type=zstd a.raw s.qcow2")),
            "a.vma" => self.derive(&format!("{imgtool} convert -q -f raw -O vma drive-scsi0=a.raw a.vma")),
            "a.vma.zst" => {
                self.make("a.vma")?;
                self.derive("zstd -q -T0 a.vma -o a.vma.zst")
            }
            "seekable.vma.zst" => {
                self.derive(&format!("{imgtool} convert -q -f raw -O vma drive-scsi0=a.raw seekable.vma.zst"))
            }
            "empty.qcow2" | "empty.vhdx" => {
                let format = name.trim_start_matches("empty.");
                self.derive(&format!("qemu-img create -q -f {format} {name} {EMPTY_SIZE}"))
            }
            other => Err(format!("no image is called {other}")),
        }
    }

    /// Removes an image that no row needs any longer.
    pub fn remove(&self, name: &str) -> Result<(), String> {
        let path = self.dir.join(name);
        if path.exists() { fs::remove_file(&path).map_err(|e| format!("{name}: {e}")) } else { Ok(()) }
    }

    fn derive(&self, command: &str) -> Result<(), String> {
        if command.contains("a.raw") {
            self.make("a.raw")?;
        }
        sh(&self.dir, command)
    }

    /// An ext4 of the machine's own files: content that is neither noise nor easy.
    fn file_system(&self, path: &Path) -> Result<(), String> {
        set_len(path, VIRTUAL_SIZE)?;
        let staging = self.dir.join("files");
        let mut room = FILES_LEN;
        for tree in &self.trees {
            copy_tree(tree, &staging.join(tree.strip_prefix("/").unwrap_or(tree)), &mut room)?;
        }
        let name = path.display();
        let made = sh(&self.dir, &format!("mkfs.ext4 -q -F -d {} {name}", staging.display()));
        fs::remove_dir_all(&staging).map_err(|e| format!("{}: {e}", staging.display()))?;
        made
    }
}

/// Copies regular files in the order of their names until `room` is used up.
fn copy_tree(from: &Path, to: &Path, room: &mut u64) -> Result<(), String> {
    let mut entries: Vec<_> = match fs::read_dir(from) {
        Ok(entries) => entries.flatten().collect(),
        Err(e) => return Err(format!("{}: {e}", from.display())),
    };
    entries.sort_by_key(fs::DirEntry::file_name);
    fs::create_dir_all(to).map_err(|e| format!("{}: {e}", to.display()))?;
    for entry in entries {
        if *room == 0 {
            return Ok(());
        }
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let Ok(meta) = fs::symlink_metadata(&source) else { continue };
        if meta.is_dir() {
            copy_tree(&source, &target, room)?;
        } else if meta.is_file() && meta.len() <= *room && fs::copy(&source, &target).is_ok() {
            *room -= meta.len();
        }
    }
    Ok(())
}

/// Short runs of noise far apart.
fn sparse(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::FileExt;
    set_len(path, SPARSE_SIZE)?;
    let describe = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = fs::File::options().write(true).open(path).map_err(describe)?;
    let runs = SPARSE_DATA / SPARSE_RUN;
    let mut state = 1u64;
    for run in 0..runs {
        let bytes: Vec<u8> = (0..SPARSE_RUN / 8).flat_map(|_| xorshift(&mut state).to_le_bytes()).collect();
        file.write_all_at(&bytes, run * (SPARSE_SIZE / runs)).map_err(describe)?;
    }
    Ok(())
}

fn xorshift(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn set_len(path: &Path, len: u64) -> Result<(), String> {
    let made = fs::File::create(path).and_then(|file| file.set_len(len));
    made.map_err(|e| format!("{}: {e}", path.display()))
}

fn sh(dir: &Path, command: &str) -> Result<(), String> {
    let status = Command::new("sh")
        .args(["-c", command])
        .current_dir(dir)
        .status()
        .map_err(|e| format!("{command}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command}: {status}")) }
}
