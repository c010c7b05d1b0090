//! The images that are converted: a file system of the machine's own files, and what follows from it.

use std::path::Path;
use std::process::Command;

/// Guest size of the main image.
const VIRTUAL_SIZE: u64 = 6 << 30;

/// Guest size of the empty images.
const EMPTY_SIZE: &str = "8T";

/// Builds all inputs in `dir`; `tree` fills the file system of the main image.
pub fn build(dir: &Path, tree: &Path) -> Result<(), String> {
    let raw = std::fs::File::create(dir.join("a.raw")).map_err(|e| e.to_string())?;
    raw.set_len(VIRTUAL_SIZE).map_err(|e| e.to_string())?;
    eprintln!("building images from {} in {}", tree.display(), dir.display());
    sh(dir, &format!("mkfs.ext4 -q -F -d {} a.raw", tree.display()))?;
    let imgtool = env!("CARGO_BIN_EXE_imgtool");
    for command in [
        "qemu-img convert -W -m 16 -f raw -O qcow2 a.raw a.qcow2".to_owned(),
        "qemu-img convert -f raw -O vhdx a.raw a.vhdx".to_owned(),
        "qemu-img convert -W -m 16 -c -f raw -O qcow2 a.raw z.qcow2".to_owned(),
        "qemu-img convert -W -m 16 -c -o compression_type=zstd -f raw -O qcow2 a.raw s.qcow2".to_owned(),
        format!("{imgtool} convert -q -f raw -O vma drive-scsi0=a.raw a.vma"),
        "zstd -q -T0 a.vma -o a.vma.zst".to_owned(),
        format!("{imgtool} convert -q -f raw -O vma drive-scsi0=a.raw seekable.vma.zst"),
        format!("truncate -s {EMPTY_SIZE} empty.raw"),
        format!("qemu-img create -q -f qcow2 empty.qcow2 {EMPTY_SIZE}"),
        format!("qemu-img create -q -f vhdx empty.vhdx {EMPTY_SIZE}"),
    ] {
        sh(dir, &command)?;
    }
    Ok(())
}

fn sh(dir: &Path, command: &str) -> Result<(), String> {
    let status = Command::new("sh")
        .args(["-c", command])
        .current_dir(dir)
        .status()
        .map_err(|e| format!("{command}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command}: {status}")) }
}
