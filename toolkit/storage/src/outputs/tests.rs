//! Tests of the guarantees of [`Outputs`].

use std::fs::Permissions;

use imgtool_core::ErrorKind;

use super::*;

/// Returns the paths in a directory with the content of each file; `None` for a directory.
fn content(dir: &Path) -> std::collections::BTreeMap<PathBuf, Option<Vec<u8>>> {
    let entries = std::fs::read_dir(dir).expect("read_dir").map(|entry| entry.expect("entry").path());
    entries.map(|path| (path.clone(), std::fs::read(&path).ok())).collect()
}

/// Asserts that `create` fails and changes nothing in `dir`.
#[track_caller]
fn assert_refused<T>(dir: &Path, create: impl FnOnce() -> Result<T>) {
    let before = content(dir);
    assert!(create().is_err());
    assert_eq!(content(dir), before);
}

#[test]
fn drop_without_commit_leaves_nothing() {
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
fn commit_renames_all_files() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let mut outputs = Outputs::new();
    outputs.create(&a, false).expect("create").write_at(b"a", 0).expect("write");
    outputs.create(&b, false).expect("create").write_at(b"b", 1).expect("write");
    outputs.commit().expect("commit");
    assert_eq!(std::fs::read(&a).expect("read"), b"a");
    assert_eq!(std::fs::read(&b).expect("read"), b"\0b");
    assert_refused(dir.path(), || Outputs::new().create(&a, false));
}

#[test]
fn failed_commit_restores_replaced_files() {
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
fn an_empty_file_is_replaced_unless_it_is_filled_meanwhile() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    for fill in [true, false] {
        let mut outputs = Outputs::new();
        for path in [&a, &b] {
            std::fs::write(path, b"").expect("write");
            outputs.create(path, false).expect("create").write_at(b"new", 0).expect("write");
        }
        if fill {
            std::fs::write(&b, b"filled").expect("write");
            assert_eq!(outputs.commit().expect_err("b is filled").kind(), ErrorKind::Refused);
        } else {
            outputs.commit().expect("commit");
        }
        let expected: [&[u8]; 2] = if fill { [b"", b"filled"] } else { [b"new", b"new"] };
        assert_eq!([&a, &b].map(|path| std::fs::read(path).expect("read")), expected);
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 2);
    }
}

#[test]
fn refuses_to_rename_a_replaced_temporary_file() {
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
        assert_eq!(std::fs::read(&temporary).expect("the other program's file"), b"other");
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
fn refuses_one_file_as_two_outputs_under_any_name() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (file, link) = (dir.path().join("f"), dir.path().join("l"));
    std::fs::write(&file, b"x").expect("write");
    std::fs::hard_link(&file, &link).expect("link");
    let mut outputs = Outputs::new();
    outputs.existing(&file, false, false).expect("first");
    assert_refused(dir.path(), || outputs.existing(&link, false, false));
    assert_refused(dir.path(), || outputs.create(&link, true));
    // The lock of the file ends with the set.
    drop(outputs);
    let mut outputs = Outputs::new();
    outputs.create(&dir.path().join("n"), true).expect("first");
    assert_refused(dir.path(), || outputs.create(&dir.path().join("./n"), true));
    outputs.create(&file, true).expect("second");
    assert_refused(dir.path(), || outputs.existing(&link, false, false));
}

#[test]
fn follows_links_and_keeps_modes() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let dir = tempfile::tempdir().expect("tempdir");
    let (file, link) = (dir.path().join("f"), dir.path().join("l"));
    symlink("f", &link).expect("link");
    assert_refused(dir.path(), || Outputs::new().create(&link, true));
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
fn refuses_a_source_as_target() {
    let dir = tempfile::tempdir().expect("tempdir");
    let source = dir.path().join("s");
    std::fs::write(&source, b"x").expect("write");
    let link = dir.path().join("l");
    std::fs::hard_link(&source, &link).expect("link");
    let mut outputs = Outputs::new();
    outputs.protect_path(&source).expect("it is there");
    assert_refused(dir.path(), || outputs.create(&link, true));
    assert_refused(dir.path(), || outputs.existing(&link, false, true));
}

#[test]
fn check_refuses_before_any_file_is_created() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (free, taken, source) =
        (dir.path().join("free"), dir.path().join("taken"), dir.path().join("source"));
    std::fs::write(&taken, b"x").expect("write");
    std::fs::write(&source, b"x").expect("write");
    let new = |path: &Path, overwrite| OutputRequest::New {
        path: path.to_owned(),
        overwrite,
        links: Links::Follow,
    };
    let mut outputs = Outputs::new();
    outputs.protect_path(&source).expect("it is there");
    outputs.check(&[new(&free, false), new(&taken, true)]).expect("fine");
    outputs.check(&[new(&dir.path().join("not/yet"), false)]).expect("a directory to be made");
    for bad in [
        vec![new(&free, false), new(&taken, false)],
        vec![new(&free, false), new(&dir.path().join("./free"), false)],
        vec![new(&free, false), new(&source, true)],
        vec![new(&free, false), OutputRequest::Existing(source.clone())],
        vec![new(&taken, true), OutputRequest::Existing(taken.clone())],
        vec![new(&dir.path().join("not/yet"), false), new(&dir.path().join("not/yet"), false)],
    ] {
        outputs.check(&bad).expect_err("refused");
    }
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 2);
}

#[test]
fn refuses_planted_links() {
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
fn creates_nothing_after_cleaning() {
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

/// Returns an entry for a file of the directory.
fn entry(folder: &Arc<Folder>, name: &str) -> Entry {
    let id = folder.handle.look_up(name.as_ref()).expect("look up").id;
    Entry { folder: folder.clone(), name: name.into(), id }
}

/// Writes files whose content is their name.
fn with_files(names: &[&str]) -> (tempfile::TempDir, Arc<Folder>) {
    let dir = tempfile::tempdir().expect("tempdir");
    for name in names {
        std::fs::write(dir.path().join(name), name).expect("write");
    }
    let folder = Folder::open(dir.path()).expect("open");
    (dir, folder)
}

#[test]
fn undo_keeps_a_file_of_another_program() {
    let (dir, folder) = with_files(&["ours", "theirs"]);
    let file = File::open(dir.path().join("ours")).expect("open");
    let output = file::new_file(dir.path().join("ours"), file);
    for name in ["theirs", "ours"] {
        let named = Entry { name: name.into(), ..entry(&folder, "ours") };
        let named = NamedFile { path: named.path(), output: output.clone(), named, old: None };
        assert_eq!(named.undo(), None);
    }
    assert_eq!(folder.handle.names().expect("names"), ["theirs"]);
}

#[test]
fn every_naming_refuses_existing_names() {
    for naming in [Naming::NoReplace, Naming::Link, Naming::Reserve] {
        let (dir, folder) = with_files(&["new", "taken"]);
        let before = content(dir.path());
        let file = entry(&folder, "new");
        let error = rename::to_free_name(&file, "taken".as_ref(), naming).expect_err("it exists");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{naming:?}");
        assert_eq!(content(dir.path()), before, "{naming:?}");
        rename::to_free_name(&file, "free".as_ref(), naming).expect("it is free");
        let after = content(dir.path());
        assert_eq!(after.len(), 2, "{naming:?}");
        assert_eq!(after[&dir.path().join("free")].as_deref(), Some(b"new".as_slice()), "{naming:?}");
    }
}

#[test]
fn failed_naming_leaves_no_reservation() {
    for naming in [Naming::NoReplace, Naming::Link, Naming::Reserve] {
        let (dir, folder) = with_files(&["new"]);
        let file = entry(&folder, "new");
        // While it is open, like every output, no other file gets its inode number.
        let _open = File::open(dir.path().join("new")).expect("open");
        std::fs::remove_file(dir.path().join("new")).expect("remove");
        rename::to_free_name(&file, "free".as_ref(), naming).expect_err("there is no file");
        assert_eq!(folder.handle.names().expect("names"), Vec::<std::ffi::OsString>::new(), "{naming:?}");
    }
}

#[test]
fn restores_a_replaced_file() {
    let (dir, folder) = with_files(&["new", "old"]);
    let file = entry(&folder, "new");
    let replaced = rename::replace(&file, "old".as_ref(), "spare".into()).expect("replace");
    assert_eq!(std::fs::read(dir.path().join("old")).expect("read"), b"new");
    let rename::Replaced::Kept(old) = replaced else { panic!("the file is lost") };
    rename::restore(old, "old".as_ref()).expect("restore");
    assert_eq!(std::fs::read(dir.path().join("old")).expect("read"), b"old");
    assert_eq!(folder.handle.names().expect("names"), ["old"]);
}

#[test]
fn moved_directory_keeps_no_outputs() {
    for is_replaced in [false, true] {
        let dir = tempfile::tempdir().expect("tempdir");
        let (there, moved) = (dir.path().join("there"), dir.path().join("moved"));
        std::fs::create_dir(&there).expect("mkdir");
        let mut outputs = Outputs::new();
        outputs.create(&there.join("a"), false).expect("create").write_at(b"a", 0).expect("write");
        outputs.directory(&there.join("made/deep")).expect("mkdir");
        outputs.create(&there.join("made/deep/b"), false).expect("create");
        std::fs::rename(&there, &moved).expect("rename");
        if is_replaced {
            std::fs::create_dir_all(there.join("made/deep")).expect("mkdir");
            std::fs::write(there.join("made/deep/theirs"), b"x").expect("write");
        }
        let error = outputs.commit().expect_err("it was moved");
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert_eq!(std::fs::read_dir(&moved).expect("read_dir").count(), 0);
        assert_eq!(there.join("made/deep/theirs").exists(), is_replaced);
    }
}

#[test]
fn moved_new_directory_is_left_empty() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (made, moved) = (dir.path().join("made"), dir.path().join("moved"));
    let mut outputs = Outputs::new();
    outputs.new_directory(&made).expect("mkdir");
    outputs.publish(&made.join("config"), b"x").expect("publish");
    outputs.create(&made.join("a"), false).expect("create");
    std::fs::rename(&made, &moved).expect("rename");
    // This one is not ours.
    std::fs::create_dir(&made).expect("mkdir");
    outputs.cleaner().clean();
    drop(outputs);
    assert_eq!(std::fs::read_dir(&moved).expect("read_dir").count(), 0);
    assert!(made.exists());
}

#[test]
fn removed_directory_gets_no_outputs() {
    let dir = tempfile::tempdir().expect("tempdir");
    let there = dir.path().join("there");
    std::fs::create_dir(&there).expect("mkdir");
    let mut outputs = Outputs::new();
    outputs.create(&there.join("a"), false).expect("create");
    std::fs::remove_dir_all(&there).expect("remove");
    outputs.create(&there.join("b"), false).expect_err("it is gone");
    outputs.commit().expect_err("it is gone");
    assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 0);
}

#[test]
fn replaces_only_regular_files() {
    for overwritten in ["directory", "link"] {
        let dir = tempfile::tempdir().expect("tempdir");
        let (old, new) = (dir.path().join("old"), dir.path().join("old/inside"));
        std::fs::write(&old, b"old").expect("write");
        let mut outputs = Outputs::new();
        outputs.create(&old, true).expect("create").write_at(b"new", 0).expect("write");
        std::fs::remove_file(&old).expect("remove");
        match overwritten {
            "directory" => std::fs::create_dir_all(&new).expect("mkdir"),
            _ => std::os::unix::fs::symlink("nowhere", &old).expect("link"),
        }
        let error = outputs.commit().expect_err("another program has put it there");
        assert!(error.to_string().contains("rename the finished output"), "{error}");
        assert_eq!(new.exists(), overwritten == "directory");
        assert_eq!(std::fs::read_dir(dir.path()).expect("read_dir").count(), 1, "{overwritten}");
        assert!(std::fs::symlink_metadata(&old).is_ok_and(|meta| !meta.is_file()));
    }
}
