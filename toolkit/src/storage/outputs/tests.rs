//! What the set of outputs promises, by itself.

use std::fs::Permissions;

use super::*;
use crate::error::ErrorKind;

/// What is in a directory: names, and the content of files.
fn content(dir: &Path) -> std::collections::BTreeMap<PathBuf, Option<Vec<u8>>> {
    let entries = std::fs::read_dir(dir).expect("read_dir").map(|entry| entry.expect("entry").path());
    entries.map(|path| (path.clone(), std::fs::read(&path).ok())).collect()
}

/// An output that may not be: an error, and nothing was written.
#[track_caller]
fn refused<T>(dir: &Path, ask: impl FnOnce() -> Result<T>) {
    let before = content(dir);
    assert!(ask().is_err());
    assert_eq!(content(dir), before);
}

#[test]
fn nothing_is_left_without_commit() {
    let dir = tempfile::tempdir().expect("tempdir");
    let target = dir.path().join("sub/deep/x.raw");
    let mut outputs = Outputs::new();
    outputs.directory(target.parent().expect("parent")).expect("mkdir");
    let output = outputs.create(&target, false).expect("create");
    output.write_at(b"abc", 0).expect("write");
    assert!(!target.exists());
    drop(outputs);
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 0);
}

#[test]
fn commit_names_all() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut outputs = Outputs::new();
    outputs.create(&a, false).expect("create").write_at(b"a", 0).expect("write");
    outputs.create(&b, false).expect("create").write_at(b"b", 1).expect("write");
    outputs.commit().expect("commit");
    assert_eq!(std::fs::read(&a).expect("read"), b"a");
    assert_eq!(std::fs::read(&b).expect("read"), b"\0b");
    refused(dir.path(), || Outputs::new().create(&a, false));
}

#[test]
fn a_failed_commit_gives_back_what_was_there() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    std::fs::write(&a, b"old").expect("write");
    let mut outputs = Outputs::new();
    outputs.create(&a, true).expect("create").write_at(b"new", 0).expect("write");
    outputs.create(&b, false).expect("create").write_at(b"new", 0).expect("write");
    outputs.create(&c, false).expect("create").write_at(b"new", 0).expect("write");
    std::fs::write(&c, b"in the way").expect("write");
    outputs.commit().expect_err("c exists by now");
    assert_eq!(std::fs::read(&a).expect("read"), b"old");
    assert!(!b.exists());
    assert_eq!(std::fs::read(&c).expect("read"), b"in the way");
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 2);
}

#[test]
fn what_was_not_written_gets_no_final_name() {
    for overwrite in [false, true] {
        let dir = tempfile::tempdir().expect("tempdir");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        if overwrite {
            std::fs::write(&b, b"old").expect("write");
        }
        let mut outputs = Outputs::new();
        outputs.create(&a, false).expect("create").write_at(b"new", 0).expect("write");
        outputs.create(&b, overwrite).expect("create").write_at(b"new", 0).expect("write");
        let of_b = |path: &PathBuf| path.to_string_lossy().contains(".b.partial-");
        let mut entries =
            std::fs::read_dir(dir.path()).expect("read_dir").flatten().map(|entry| entry.path());
        let temporary = entries.find(of_b).expect("the unfinished file");
        std::fs::remove_file(&temporary).expect("remove");
        std::fs::write(&temporary, b"other").expect("write");
        let error = outputs.commit().expect_err("it is another file");
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(!a.exists());
        assert_eq!(std::fs::read(&b).ok().as_deref(), overwrite.then_some(b"old".as_slice()));
        assert_eq!(std::fs::read(&temporary).expect("somebody else's"), b"other");
    }
}

#[test]
fn overwriting_leaves_only_the_new_file() {
    let dir = tempfile::tempdir().expect("tempdir");
    let a = dir.path().join("a");
    std::fs::write(&a, b"old").expect("write");
    let mut outputs = Outputs::new();
    outputs.create(&a, true).expect("create").write_at(b"new", 0).expect("write");
    outputs.commit().expect("commit");
    assert_eq!(std::fs::read(&a).expect("read"), b"new");
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 1);
}

#[test]
fn long_names_still_get_a_partial_name() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("ä".repeat(127));
    let mut outputs = Outputs::new();
    outputs.create(&path, false).expect("create");
    outputs.commit().expect("commit");
    assert!(path.exists());
}

#[test]
fn one_file_is_not_two_outputs_under_any_name() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (file, link) = (dir.path().join("f"), dir.path().join("l"));
    std::fs::write(&file, b"x").expect("write");
    std::fs::hard_link(&file, &link).expect("link");
    let mut outputs = Outputs::new();
    outputs.existing(&file, false, false).expect("first");
    refused(dir.path(), || outputs.existing(&link, false, false));
    refused(dir.path(), || outputs.create(&link, true));
    let mut outputs = Outputs::new();
    outputs.create(&dir.path().join("n"), true).expect("first");
    refused(dir.path(), || outputs.create(&dir.path().join("./n"), true));
    outputs.create(&file, true).expect("second");
    refused(dir.path(), || outputs.existing(&link, false, false));
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_modes_are_kept() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let dir = tempfile::tempdir().expect("tempdir");
    let (file, link) = (dir.path().join("f"), dir.path().join("l"));
    symlink("f", &link).expect("link");
    refused(dir.path(), || Outputs::new().create(&link, true));
    std::fs::write(&file, b"old").expect("write");
    std::fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("mode");
    let mut outputs = Outputs::new();
    outputs.create(&link, true).expect("create").write_at(b"new", 0).expect("write");
    outputs.commit().expect("commit");
    assert_eq!(std::fs::read(&file).expect("read"), b"new");
    assert!(std::fs::symlink_metadata(&link).expect("meta").is_symlink());
    assert_eq!(std::fs::metadata(&file).expect("meta").permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_source_is_not_a_target() {
    let dir = tempfile::tempdir().expect("tempdir");
    let source = dir.path().join("s");
    std::fs::write(&source, b"x").expect("write");
    let link = dir.path().join("l");
    std::fs::hard_link(&source, &link).expect("link");
    let mut outputs = Outputs::new();
    outputs.protect(&source).expect("it is there");
    refused(dir.path(), || outputs.create(&link, true));
    refused(dir.path(), || outputs.existing(&link, false, true));
}

#[test]
fn all_outputs_are_checked_before_one_is_made() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (free, taken, source) =
        (dir.path().join("free"), dir.path().join("taken"), dir.path().join("source"));
    std::fs::write(&taken, b"x").expect("write");
    std::fs::write(&source, b"x").expect("write");
    let new = |path: &Path, overwrite| Wanted::New { path: path.to_owned(), overwrite, links: Links::Follow };
    let mut outputs = Outputs::new();
    outputs.protect(&source).expect("it is there");
    outputs.check(&[new(&free, false), new(&taken, true)]).expect("fine");
    outputs.check(&[new(&dir.path().join("not/yet"), false)]).expect("a directory to be made");
    for bad in [
        vec![new(&free, false), new(&taken, false)],
        vec![new(&free, false), new(&dir.path().join("./free"), false)],
        vec![new(&free, false), new(&source, true)],
        vec![new(&free, false), Wanted::Existing(source.clone())],
        vec![new(&taken, true), Wanted::Existing(taken.clone())],
        vec![new(&dir.path().join("not/yet"), false), new(&dir.path().join("not/yet"), false)],
    ] {
        outputs.check(&bad).expect_err("refused");
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 2);
}

#[cfg(unix)]
#[test]
fn a_link_under_a_name_from_an_image_is_not_followed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (victim, link, nowhere) = (dir.path().join("v"), dir.path().join("l"), dir.path().join("n"));
    std::fs::write(&victim, b"old").expect("write");
    std::os::unix::fs::symlink(&victim, &link).expect("link");
    std::os::unix::fs::symlink("nowhere", &nowhere).expect("link");
    for path in [&link, &nowhere] {
        for overwrite in [false, true] {
            let refused = Outputs::new().create_linked(path, overwrite, Links::Refuse);
            assert_eq!(refused.err().map(|e| e.kind()), Some(ErrorKind::Refused));
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 3);
    assert_eq!(std::fs::read(&victim).expect("read"), b"old");
}

#[test]
fn nothing_is_begun_after_cleaning() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut outputs = Outputs::new();
    outputs.directory(&dir.path().join("d")).expect("mkdir");
    outputs.create(&dir.path().join("d/a"), false).expect("create");
    outputs.cleaner().clean();
    assert_eq!(
        outputs.create(&dir.path().join("b"), false).err().map(|e| e.kind()),
        Some(ErrorKind::Cancelled)
    );
    assert!(outputs.directory(&dir.path().join("e")).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 0);
}

#[test]
fn a_name_that_somebody_took_meanwhile_is_not_taken_back() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    std::fs::write(&a, b"theirs").expect("write");
    std::fs::write(&b, b"ours").expect("write");
    let id = std::fs::metadata(&b).ok().map(|meta| os::file_identity(&meta));
    assert_eq!(Named { path: a.clone(), id, old: None }.undo(), None);
    assert_eq!(Named { path: b.clone(), id, old: None }.undo(), None);
    assert!(a.exists() && !b.exists());
}
