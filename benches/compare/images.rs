//! Source images. Each is created for the first row that needs it and, except for `a.raw`, removed after the
//! last one, so that a tmpfs need not hold them all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Virtual size in bytes of the main image.
const VIRTUAL_SIZE: u64 = 4 << 30;

/// Maximum total length in bytes of the files in the main image.
const FILES_LEN: u64 = 1400 << 20;

/// Virtual size in bytes of the sparse image.
const SPARSE_SIZE: u64 = 1 << 40;

/// Number of data bytes in the sparse image.
const SPARSE_DATA: u64 = 256 << 20;

/// Length in bytes of each run of data in the sparse image.
const SPARSE_RUN: u64 = 64 << 10;

/// Virtual size in bytes of the scattered image.
const SCATTERED_SIZE: u64 = 40 << 30;

/// Number of data bytes in the scattered image.
const SCATTERED_DATA: u64 = 2 << 30;

/// Length in bytes of each run of data in the scattered image.
const SCATTERED_RUN: u64 = 4 << 10;

/// Virtual size in bytes of the empty images.
const EMPTY_SIZE: u64 = 8 << 40;

/// Directory of the images, and the directory trees whose files fill the main image.
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

    /// Creates the image with this name unless it already exists.
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
            "sparse.raw" => sparse(&path, SPARSE_SIZE, SPARSE_DATA, SPARSE_RUN),
            "scattered.raw" => sparse(&path, SCATTERED_SIZE, SCATTERED_DATA, SCATTERED_RUN),
            "empty.raw" => set_len(&path, EMPTY_SIZE),
            "a.qcow2" => self.derive(&format!("{qemu} a.raw a.qcow2")),
            "a.vhdx" => self.derive("qemu-img convert -f raw -O vhdx a.raw a.vhdx"),
            "a.vmdk" => self.derive("qemu-img convert -f raw -O vmdk a.raw a.vmdk"),
            "a.vhd" => self.derive("qemu-img convert -f raw -O vpc -o force_size=on a.raw a.vhd"),
            "a.vdi" => self.derive("qemu-img convert -f raw -O vdi a.raw a.vdi"),
            "stream.vmdk" => {
                self.derive(&format!("{imgtool} convert -q -f raw -O vmdk a.raw stream.vmdk"))
            }
            "luks.qcow2" => self.derive(
                "printf secret > passphrase && qemu-img convert -f raw -O qcow2 \
                 --object secret,id=s,file=passphrase -o encrypt.format=luks,encrypt.key-secret=s a.raw luks.qcow2",
            ),
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
            other => Err(format!("unknown image {other}")),
        }
    }

    /// Removes the image with this name if it exists.
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

    /// Creates an ext4 file system and fills it with the files of the trees, since programs and text compress
    /// like the disk of a real guest.
    fn file_system(&self, path: &Path) -> Result<(), String> {
        set_len(path, VIRTUAL_SIZE)?;
        let staging = self.dir.join("files");
        let mut remaining = FILES_LEN;
        for tree in &self.trees {
            copy_tree(tree, &staging.join(tree.strip_prefix("/").unwrap_or(tree)), &mut remaining)?;
        }
        let name = path.display();
        let made = sh(&self.dir, &format!("mkfs.ext4 -q -F -d {} {name}", staging.display()));
        fs::remove_dir_all(&staging).map_err(|e| format!("{}: {e}", staging.display()))?;
        made
    }
}

/// Copies the regular files below `from` in the order of their names. Skips files that cannot be read or are
/// longer than `remaining` bytes.
fn copy_tree(from: &Path, to: &Path, remaining: &mut u64) -> Result<(), String> {
    let mut entries: Vec<_> = match fs::read_dir(from) {
        Ok(entries) => entries.flatten().collect(),
        Err(e) => return Err(format!("{}: {e}", from.display())),
    };
    entries.sort_by_key(fs::DirEntry::file_name);
    fs::create_dir_all(to).map_err(|e| format!("{}: {e}", to.display()))?;
    for entry in entries {
        if *remaining == 0 {
            return Ok(());
        }
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let Ok(meta) = fs::symlink_metadata(&source) else { continue };
        if meta.is_dir() {
            copy_tree(&source, &target, remaining)?;
        } else if meta.is_file() && meta.len() <= *remaining && fs::copy(&source, &target).is_ok() {
            *remaining -= meta.len();
        }
    }
    Ok(())
}

/// Creates an image of `size` bytes with `data` bytes of noise, in runs of `run_len` bytes at equal
/// distances.
fn sparse(path: &Path, size: u64, data: u64, run_len: u64) -> Result<(), String> {
    use std::os::unix::fs::FileExt;
    set_len(path, size)?;
    let describe = |e: std::io::Error| format!("{}: {e}", path.display());
    let file = fs::File::options().write(true).open(path).map_err(describe)?;
    let runs = data / run_len;
    let mut state = 1u64;
    for run in 0..runs {
        let bytes: Vec<u8> = (0..run_len / 8).flat_map(|_| xorshift(&mut state).to_le_bytes()).collect();
        file.write_all_at(&bytes, run * (size / runs)).map_err(describe)?;
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
