//! Passphrases: several for one run, the places that they come from, and their end.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use imgtool_testing::images::noise;
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::{require, tempdir};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Options for little work in the key derivation.
const QUICK: &str = "encrypt=luks,encrypt.iterations=1000";

/// Makes a disk, files with the passphrases "below" and "above", an image with the first, and an overlay of other
/// content with the second.
fn chain() -> tempfile::TempDir {
    let dir = tempdir();
    let mut disk = noise(5, 1 << 20);
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("disk.raw"), &disk).unwrap();
    disk[200_000..300_000].fill(7);
    std::fs::write(path("changed.raw"), &disk).unwrap();
    for name in ["below", "above", "other"] {
        std::fs::write(path(name), name).unwrap();
    }
    let run = |line: &[&str]| drop(imgtool(line).within(dir.path()).ok());
    run(&["convert", "-o", QUICK, "--target-secret", "file=below", "disk.raw", "base.qcow2"]);
    // The image is read back through its base, which has another passphrase.
    let over = ["convert", "--verify", "-o", QUICK, "-B", "base.qcow2", "-F", "qcow2"];
    let secrets = ["--secret", "file=below", "--target-secret", "file=above"];
    run(&[&over[..], &secrets, &["changed.raw", "top.qcow2"]].concat());
    dir
}

#[test]
fn each_image_of_a_chain_may_have_its_own_passphrase() {
    let dir = chain();
    let convert = |secrets: &[&str]| {
        let flags = secrets.iter().flat_map(|secret| ["--secret", secret]);
        let line: Vec<&str> =
            ["convert", "--force", "--allow-external", "chain"].into_iter().chain(flags).collect();
        imgtool(line).args(["top.qcow2", "out.raw"]).within(dir.path())
    };
    for secrets in [["file=below", "file=above"], ["file=above", "file=below"]] {
        convert(&secrets).ok();
        imgtool(["compare", "out.raw", "changed.raw"]).within(dir.path()).ok();
    }
    convert(&["file=other", "file=above", "file=above", "file=below"]).ok();
    convert(&["file=above"]).go().exits(1).says("base.qcow2: wrong passphrase");
    let wrong = convert(&["file=other", "file=below"]).go().exits(1);
    wrong.says("top.qcow2: wrong passphrase: none of the 2 opens the only key slot in use");
    let images =
        ["checksum", "--allow-external", "chain", "--secret", "file=above", "--secret", "file=below"];
    imgtool(images).args(["base.qcow2", "top.qcow2"]).within(dir.path()).ok();
}

#[test]
fn options_state_the_passphrase_of_each_image() {
    require!("qemu-img");
    let dir = chain();
    let objects = ["--object", "secret,id=s0,file=below", "--object", "secret,id=s1,file=above"];
    let name = |top: &str, base: &str| {
        format!(
            "driver=qcow2,encrypt.key-secret={top},file.filename=top.qcow2,backing.driver=qcow2,\
             backing.encrypt.key-secret={base},backing.file.filename=base.qcow2"
        )
    };
    for (top, base, is_right) in [("s1", "s0", true), ("s0", "s1", false), ("s1", "s1", false)] {
        let name = name(top, base);
        let plain = "driver=raw,file.filename=changed.raw";
        let line = [&["compare"], &objects[..], &["--image-opts", &name, plain]].concat();
        let (theirs, _, errors) = try_run_in("qemu-img", dir.path(), &line);
        let ours = imgtool(&line).within(dir.path()).go();
        assert_eq!((theirs == 0, ours.status.success()), (is_right, is_right), "{errors}{}", ours.stderr);
    }
}

/// The first AES of QEMU opens with every passphrase, so none of several can be chosen.
#[test]
fn several_passphrases_are_refused_for_an_image_that_opens_with_each() {
    require!("qemu-img");
    let dir = chain();
    let set = "encrypt.format=aes,encrypt.key-secret=s";
    let line = ["convert", "--object", "secret,id=s,file=below", "-f", "raw", "-O", "qcow2", "-o", set];
    run_in("qemu-img", dir.path(), &[&line[..], &["disk.raw", "old.qcow2"]].concat());
    let both = ["compare", "--secret", "file=below", "--secret", "file=above", "old.qcow2", "disk.raw"];
    let refused = imgtool(both).within(dir.path()).go().ends_with(2);
    refused.says("can't tell which of 2 passphrases is right").says("give one --secret");
    let stated = "driver=qcow2,encrypt.key-secret=s0,file.filename=old.qcow2";
    let objects = ["--object", "secret,id=s0,file=below", "--secret", "file=above", "--secret", "file=other"];
    let plain = "driver=raw,file.filename=disk.raw";
    imgtool([&["compare"], &objects[..], &["--image-opts", stated, plain]].concat()).within(dir.path()).ok();
}

#[test]
fn passphrases_are_bounded_and_none_of_several_is_that_of_the_output() {
    let dir = chain();
    let names: Vec<String> = (0..17).map(|number| format!("p{number}")).collect();
    names.iter().for_each(|name| std::fs::write(dir.path().join(name), name).unwrap());
    let flags = |count: usize| names.iter().take(count).map(|name| format!("--secret=file={name}"));
    let info = |count: usize| imgtool(["info", "base.qcow2"]).args(flags(count)).within(dir.path());
    info(16).ok();
    info(17).go().exits(2).says("17 passphrases are given, more than 16");
    let lock = |count: usize| {
        imgtool(["convert", "-O", "luks", "-o", "iterations=1000"])
            .args(flags(count))
            .args(["disk.raw", "new.luks"])
    };
    lock(2).within(dir.path()).go().exits(2).says("--target-secret");
    lock(1).within(dir.path()).ok();
}

/// Runs the program from bash with a socket as standard input, which `script` may move. The passphrase arrives in two
/// parts, without a line end.
fn through_socket(directory: &Path, script: &str) -> std::process::Output {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut run = Command::new("bash");
    let run = run.args(["-c", script]).env("IMGTOOL", PROGRAM).current_dir(directory);
    let child = run.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = child.spawn().unwrap();
    // The command holds the other end.
    run.stdin(Stdio::null());
    // Most scripts close it unread.
    let _ = ours.write_all(b"bel");
    std::thread::sleep(std::time::Duration::from_millis(50));
    let _ = ours.write_all(b"ow");
    drop(ours);
    child.wait_with_output().unwrap()
}

#[test]
fn descriptors_may_be_sockets_pipes_and_files() {
    require!("bash");
    let dir = chain();
    let checksum = r#"exec "$IMGTOOL" checksum --secret fd=3 base.qcow2"#;
    for (name, script) in [
        ("socket as standard input", r#"exec "$IMGTOOL" checksum --secret fd=0 base.qcow2"#.to_owned()),
        ("socket", format!("exec 3<&0 </dev/null; {checksum}")),
        ("pipe", format!("exec 3< <(printf below); sleep 0.1; {checksum}")),
        // Its writer has gone: to open it again would wait for another.
        ("FIFO", format!("mkfifo f; printf below >f & exec 3<f; wait; {checksum}")),
        ("file", format!("exec 3<below; {checksum}")),
        (
            "file by two flags",
            r#"exec 3<below; exec "$IMGTOOL" checksum --secret fd=3 --secret fd=3 base.qcow2"#.to_owned(),
        ),
        ("text", format!("exec 3<<<below; {checksum}")),
        (
            "second line of a file",
            format!("printf 'above\\nbelow' >two; exec 3<two; read -r -u 3; {checksum}"),
        ),
    ] {
        let run = through_socket(dir.path(), &script);
        assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
    }
}

/// Each message says what failed and what to do.
#[test]
fn mistakes_with_passphrases_are_explained() {
    let dir = chain();
    let write = |name: &str, content: &[u8]| std::fs::write(dir.path().join(name), content).unwrap();
    write("empty", b"");
    write("line", b"\n");
    write("long", &[b'x'; (64 << 10) + 2]);
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let run = |secret: &str| {
        imgtool(["checksum", "--secret", secret, "base.qcow2"]).env("EMPTY", "").within(dir.path()).go()
    };
    for (secret, code, message, hint) in [
        ("file=missing", 1, "missing: can't open the passphrase: No such file", "path of a file that holds"),
        ("file=folder", 1, "folder: can't read the passphrase: Is a directory", "name the file"),
        ("file=empty", 2, "empty: the passphrase is empty", "write the passphrase into the file"),
        ("file=line", 2, "line: the passphrase is empty", "write the passphrase into the file"),
        ("file=long", 2, "long: the passphrase is longer than 65536 bytes", "is this the right one?"),
        ("env=NO_SUCH", 2, "the environment variable NO_SUCH is not set", "export NAME"),
        ("env=EMPTY", 2, "variable EMPTY: the passphrase is empty", "has no value"),
        ("fd=977", 2, "file descriptor 977 is not open", "--secret fd=3 3<FILE"),
        ("fd=0", 2, "file descriptor 0: the passphrase is empty", "did the command before the pipe fail?"),
        ("file=other", 1, "base.qcow2: wrong passphrase", "check the passphrase and its line end"),
    ] {
        run(secret).ends_with(code).says(message).says(hint);
    }
    for (flags, message) in [(&[][..], "--secret file=PATH, env=NAME or fd=N"), (&["--secret"], "a value")] {
        let line = [&["checksum", "base.qcow2"], flags].concat();
        imgtool(line).within(dir.path()).go().says(message);
    }
}

/// Returns true if the writable memory of a process contains `text`.
fn memory_contains(process: u32, text: &[u8]) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let memory = std::fs::File::open(format!("/proc/{process}/mem")).unwrap();
    let regions = maps.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next()?, words.next()?);
        let (start, end) = range.split_once('-').filter(|_| rights.starts_with("rw"))?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    regions.into_iter().any(|(start, end)| {
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        let read = std::os::unix::fs::FileExt::read_at(&memory, &mut bytes, start).unwrap_or(0);
        bytes[..read].windows(text.len()).any(|window| window == text)
    })
}

/// While content is copied, only keys are in memory. The passphrase of the environment stays there, which proves that
/// the search finds it.
#[test]
fn a_passphrase_leaves_the_memory_before_content_is_copied() {
    const WORDS: &str = "violet-cucumber-lantern-39-obelisk";
    let dir = tempdir();
    std::fs::write(dir.path().join("disk.raw"), noise(2, 4 << 20)).unwrap();
    std::fs::write(dir.path().join("words"), format!("{WORDS}\n")).unwrap();
    let lock = ["convert", "-o", QUICK, "--secret", "file=words", "disk.raw", "image.qcow2"];
    imgtool(lock).within(dir.path()).ok();
    let relock = ["-O", "luks", "-o", "iterations=1000", "--target-secret", "file=words"];
    for (secret, target, stays) in [
        ("file=words", &["-O", "raw"][..], false),
        ("file=words", &relock, false),
        ("env=WORDS", &["-O", "raw"], true),
    ] {
        let line = [&["convert", "--secret", secret], target, &["image.qcow2", "-"]].concat();
        let run = imgtool(line).within(dir.path());
        let run = if stays { run.env("WORDS", WORDS) } else { run };
        let mut child = run.start_piped();
        let mut stdout = child.stdout.take().unwrap();
        // The pipe is full soon, so the copy waits.
        stdout.read_exact(&mut [0; 1]).unwrap();
        assert_eq!(memory_contains(child.id(), WORDS.as_bytes()), stays, "{secret} {target:?}");
        drop(stdout);
        child.wait().unwrap();
    }
}
