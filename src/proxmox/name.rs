//! Names of backup files that `qmrestore` accepts: `vzdump-qemu-VMID-YYYY_MM_DD-HH_MM_SS.vma`.

use std::fmt;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Local};
use imgtool_storage::Compression;

/// Prefix that `qmrestore` requires of an archive's name.
const PREFIX: &str = "vzdump-qemu-";

/// Start of the names of all backups of Proxmox VE.
const BACKUP: &str = "vzdump";

/// True if the user chose a name for a backup of Proxmox VE, be it a valid one or not.
pub fn is_for_proxmox(dest: &Path) -> bool {
    dest.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(BACKUP))
}

/// True if this is the number of a guest.
fn is_vmid(text: &str) -> bool {
    // Proxmox VE has numbers from 100 to 999999999.
    (3..=9).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0')
}

/// Returns the number of a guest from the name of its configuration, as in `/etc/pve/qemu-server/100.conf`.
pub fn vmid_of_config(path: &Path) -> Option<&str> {
    path.file_stem()?.to_str().filter(|stem| is_vmid(stem))
}

/// Returns the guest number in `vzdump-qemu-VMID-YYYY_MM_DD-HH_MM_SS.vma…`; `None` for any other name.
pub fn vmid_of(name: &str) -> Option<&str> {
    let (vmid, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let (time, extension) = rest.split_once(".vma")?;
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    let known = matches!(extension, "" | ".zst" | ".gz" | ".lzo");
    let is_number = !vmid.is_empty() && vmid.bytes().all(|byte| byte.is_ascii_digit());
    (known && is_number && shape == "0000_00_00-00_00_00").then_some(vmid)
}

/// A name that `qmrestore` accepts instead of another one.
#[derive(Debug)]
pub struct Better {
    old: PathBuf,
    new: PathBuf,
}

impl Better {
    /// Returns a better name for an archive. The guest number is `vmid`, or one in the old name; the time is
    /// `epoch`, in seconds since 1970, or now.
    pub fn of(dest: &Path, compression: Option<Compression>, vmid: Option<&str>, epoch: Option<i64>) -> Self {
        let name = dest.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Four digits are more often a year.
        let is_likely = |number: &&str| is_vmid(number) && number.len() != 4;
        let mut numbers = name.split(|c: char| !c.is_ascii_digit());
        let vmid = vmid.or_else(|| numbers.find(is_likely)).unwrap_or("100");
        let time = match epoch.and_then(|seconds| DateTime::from_timestamp(seconds, 0)) {
            Some(time) => time.naive_utc(),
            None => Local::now().naive_local(),
        };
        let time = time.format("%Y_%m_%d-%H_%M_%S");
        let new = dest.with_file_name(format!("{PREFIX}{vmid}-{time}{}", extension(compression)));
        Self { old: dest.to_owned(), new }
    }
}

impl Better {
    /// Returns the new path.
    pub fn into_path(self) -> PathBuf {
        self.new
    }
}

impl fmt::Display for Better {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mv {} {}", quoted(&self.old), quoted(&self.new))
    }
}

/// Returns a path as a word of a shell.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._/-+:@%=,".contains(c);
    let word = if text.chars().all(is_plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    };
    // A name such as -x would be an option.
    if word.trim_start_matches('\'').starts_with('-') { format!("./{word}") } else { word }
}

fn extension(compression: Option<Compression>) -> &'static str {
    match compression {
        None => ".vma",
        Some(Compression::Gzip) => ".vma.gz",
        Some(_) => ".vma.zst",
    }
}

/// Returns a note if `qmrestore` will refuse the name of an archive: the command that renames it.
pub fn note_on_name(
    dest: &Path,
    compression: Option<Compression>,
    vmid: Option<&str>,
    epoch: Option<i64>,
) -> Option<String> {
    let name = dest.file_name()?.to_str()?;
    if vmid_of(name).is_some() && name.ends_with(extension(compression)) {
        return None;
    }
    let better = Better::of(dest, compression, vmid, epoch);
    Some(format!("qmrestore refuses the name '{name}': {better}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_names_that_qmrestore_accepts() {
        let note =
            |name: &str, compression| note_on_name(Path::new(name), compression, None, Some(1_790_000_000));
        let name = "d/vzdump-qemu-100-2026_11_22-10_03_58.vma";
        assert!(note(name, None).is_none());
        assert!(note(&format!("{name}.zst"), Some(Compression::Zstd)).is_none());
        assert!(note(&format!("{name}.gz"), Some(Compression::Gzip)).is_none());
        // A compressed archive must have the extension of its compression.
        for (name, compression, better) in [
            (name, Some(Compression::Zstd), "100-2026_09_21-14_13_20.vma.zst"),
            ("vm.vma", None, "mv vm.vma vzdump-qemu-100-2026_09_21-14_13_20.vma"),
            ("d/my vm 105.vma", None, "mv 'd/my vm 105.vma' d/vzdump-qemu-105-2026_09_21-14_13_20.vma"),
            ("vzdump-qemu-x-2026_11_22-10_03_58.vma", None, "vzdump-qemu-100-"),
            ("vzdump-qemu-100.vma", None, "vzdump-qemu-100-2026_09_21"),
        ] {
            let note = note(name, compression).expect("a note");
            assert!(note.contains(better), "{note}");
            assert!(
                vmid_of(note.rsplit('/').next().and_then(|end| end.rsplit(' ').next()).expect("a name"))
                    .is_some()
            );
        }
    }
}
