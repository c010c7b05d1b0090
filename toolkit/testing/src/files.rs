//! Files and directories of tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Returns the path of a fixture in the repository, by its file name.
pub fn fixture(name: &str) -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("below toolkit");
    repository.join("fixtures").join(name)
}

/// Creates a temporary directory, removed when the returned value is dropped.
pub fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Returns a path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Returns the SHA-256 of a file in lower-case hexadecimal.
pub fn sha256_file(path: &Path) -> String {
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut chunk).expect("read");
        if count == 0 {
            break;
        }
        hasher.update(&chunk[..count]);
    }
    hex(&hasher.finalize())
}

/// Returns the SHA-256 of bytes in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns everything below a directory by relative path: the SHA-256 of each file, `dir` for each directory.
pub fn snapshot(directory: &Path) -> BTreeMap<String, String> {
    fn walk(root: &Path, directory: &Path, found: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(directory).expect("read_dir") {
            let path = entry.expect("entry").path();
            let name = text(path.strip_prefix(root).expect("below root")).to_owned();
            if path.is_dir() {
                found.insert(name, "dir".to_owned());
                walk(root, &path, found);
            } else {
                found.insert(name, sha256_file(&path));
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(directory, directory, &mut found);
    found
}

/// Returns the sorted names of the entries directly in a directory.
pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
}

/// Asserts that `longer` contains the bytes of `shorter`, then zeros up to a multiple of `multiple` bytes:
/// formats with sectors round sizes up.
#[track_caller]
pub fn assert_same_rounded(shorter: &Path, longer: &Path, multiple: u64, what: &str) {
    let wanted = std::fs::metadata(shorter).unwrap().len();
    let got = std::fs::metadata(longer).unwrap_or_else(|e| panic!("{what}: {}: {e}", longer.display())).len();
    assert_eq!(got, wanted.next_multiple_of(multiple), "{what}: length");
    if let Some(position) = first_difference(shorter, longer) {
        panic!("{what}: {} and {} differ at byte {position}", shorter.display(), longer.display());
    }
}

/// Asserts that two files contain the same bytes.
#[track_caller]
pub fn assert_same(a: &Path, b: &Path, what: &str) {
    assert_same_rounded(a, b, 1, what);
}

/// Returns the position of the first byte in which two files differ. The shorter file counts as padded with
/// zeros.
pub fn first_difference(a: &Path, b: &Path) -> Option<u64> {
    let open = |path: &Path| File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (mut a, mut b) = (open(a), open(b));
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut position = 0;
    loop {
        let (got_left, got_right) = (fill(&mut a, &mut left), fill(&mut b, &mut right));
        let len = got_left.max(got_right);
        if len == 0 {
            return None;
        }
        left[got_left..len].fill(0);
        right[got_right..len].fill(0);
        if left[..len] != right[..len] {
            let at = left[..len].iter().zip(&right[..len]).position(|(x, y)| x != y).unwrap_or(0);
            return Some(position + at as u64);
        }
        position += len as u64;
    }
}

fn fill(file: &mut File, buf: &mut [u8]) -> usize {
    let mut filled = 0;
    while filled < buf.len() {
        match file.read(&mut buf[filled..]).expect("read") {
            0 => break,
            count => filled += count,
        }
    }
    filled
}

/// Returns the size in bytes that a file occupies on disk.
pub fn occupied(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).blocks() * 512
}
