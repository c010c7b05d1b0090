//! Encrypted images: those of qemu-img read by this program, and ours read by qemu-img and cryptsetup.

use std::path::{Path, PathBuf};

use imgtool_testing::oracles::run_in;
use imgtool_testing::{require, tempdir};

use crate::support::imgtool;

/// Passphrase of all images. It has a space, and its file ends with a line end.
const PASSPHRASE: &str = "correct horse 1";

/// A directory with passphrases, and a raw disk of data, zeros and a ragged end.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(len: usize) -> Self {
        let dir = tempdir();
        let mut state = 1u64;
        let mut bytes: Vec<u8> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        bytes[len / 3..len / 2].fill(0);
        std::fs::write(dir.path().join("disk.raw"), bytes).unwrap();
        std::fs::write(dir.path().join("exact"), PASSPHRASE).unwrap();
        std::fs::write(dir.path().join("line"), format!("{PASSPHRASE}\n")).unwrap();
        std::fs::write(dir.path().join("wrong"), "correct horse 2").unwrap();
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Runs a program of QEMU with the passphrase as the secret `s`.
    #[track_caller]
    fn qemu(&self, tool: &str, args: &[&str]) {
        let secret = "secret,id=s,file=exact";
        let (command, rest) = args.split_at(usize::from(tool == "qemu-img"));
        run_in(tool, self.path(), &[command, &["--object", secret], rest].concat());
    }

    /// Lets cryptsetup change a container, with little work in the key derivation.
    #[track_caller]
    fn cryptsetup(&self, args: &[&str]) {
        let all = ["-q", "--pbkdf-force-iterations", "1000"];
        run_in("cryptsetup", self.path(), &[args, &all].concat());
    }

    /// Makes an encrypted copy of the disk with qemu-img.
    #[track_caller]
    fn make(&self, format: &str, options: &str, image: &str) {
        let prefix = if format == "luks" { "" } else { "encrypt." };
        let mut all = format!("{prefix}key-secret=s");
        for option in options.split(',').filter(|option| !option.is_empty()) {
            all.push_str(&format!(",{option}"));
        }
        self.qemu("qemu-img", &["convert", "-f", "raw", "-O", format, "-o", &all, "disk.raw", image]);
    }

    /// Asserts that our program reads `image` as the disk.
    #[track_caller]
    fn assert_read(&self, image: &str) {
        imgtool(["compare", "--secret", "file=line", image, "disk.raw"]).within(self.path()).ok();
    }

    /// Asserts that qemu-img reads `image` as the raw disk `raw`.
    #[track_caller]
    fn assert_qemu_reads(&self, format: &str, image: &str, raw: &str) {
        let key = if format == "luks" { "key-secret" } else { "encrypt.key-secret" };
        let ours = format!("driver={format},{key}=s,file.filename={image}");
        let plain = format!("driver=raw,file.filename={raw}");
        self.qemu("qemu-img", &["compare", "--image-opts", &ours, &plain]);
    }
}

/// Every mode in which qemu-img 10 makes a container with a cipher. Keys of 192 bits work in XTS mode only.
fn reads_every_mode(cipher: &str) {
    require!("qemu-img");
    let bench = Bench::new(100_352);
    for bits in ["128", "192", "256"] {
        for mode in ["xts", "cbc", "ctr", "ecb"] {
            let is_cast5 = cipher == "cast5";
            if bits == "192" && mode != "xts" || is_cast5 && (bits != "128" || mode == "xts") {
                continue;
            }
            let set = format!("iter-time=10,cipher-alg={cipher}-{bits},cipher-mode={mode}");
            bench.make("luks", &set, "image.luks");
            bench.assert_read("image.luks");
        }
    }
}

#[test]
fn reads_aes_of_qemu_img_in_every_mode() {
    reads_every_mode("aes");
}

#[test]
fn reads_serpent_of_qemu_img_in_every_mode() {
    reads_every_mode("serpent");
}

#[test]
fn reads_twofish_of_qemu_img_in_every_mode() {
    reads_every_mode("twofish");
}

#[test]
fn reads_cast5_of_qemu_img_in_every_mode() {
    reads_every_mode("cast5");
}

/// The rules for initialisation vectors, each with every mode and with every cipher.
#[test]
fn reads_every_rule_for_vectors_of_qemu_img() {
    require!("qemu-img");
    let bench = Bench::new(100_352);
    for (cipher, mode, rule) in [
        ("aes-128", "cbc", "plain"),
        ("aes-256", "xts", "plain"),
        ("aes-256", "xts", "essiv,ivgen-hash-alg=sha256"),
        ("aes-256", "cbc", "essiv,ivgen-hash-alg=sha256"),
        ("aes-128", "cbc", "essiv,ivgen-hash-alg=md5"),
        ("aes-192", "xts", "essiv,ivgen-hash-alg=md5"),
        ("aes-256", "ecb", "essiv,ivgen-hash-alg=sha256"),
        ("serpent-256", "cbc", "essiv,ivgen-hash-alg=sha256"),
        ("twofish-128", "ctr", "essiv,ivgen-hash-alg=sha256"),
        ("cast5-128", "cbc", "essiv,ivgen-hash-alg=md5"),
        ("cast5-128", "ctr", "plain"),
    ] {
        let set = format!("iter-time=10,cipher-alg={cipher},cipher-mode={mode},ivgen-alg={rule}");
        bench.make("luks", &set, "image.luks");
        bench.assert_read("image.luks");
    }
}

#[test]
fn reads_every_hash_of_qemu_img() {
    require!("qemu-img");
    let bench = Bench::new(100_352);
    for hash in ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"] {
        bench.make("luks", &format!("iter-time=10,hash-alg={hash}"), "image.luks");
        bench.assert_read("image.luks");
    }
}

/// The sector numbers of LUKS in qcow2 are those of the file, and those of the older AES those of the guest.
#[test]
fn reads_encrypted_qcow2_images() {
    require!("qemu-img");
    let bench = Bench::new(3_000_320);
    for options in [
        "encrypt.format=luks",
        "encrypt.format=luks,encrypt.cipher-alg=serpent-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
        "encrypt.format=luks,encrypt.cipher-alg=twofish-128,encrypt.cipher-mode=ctr",
        "encrypt.format=luks,encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1",
        "encrypt.format=luks,cluster_size=512",
        "encrypt.format=luks,cluster_size=2M",
        "encrypt.format=luks,compat=0.10",
        "encrypt.format=luks,extended_l2=on",
        "encrypt.format=luks,data_file=image.data",
        "encrypt.format=aes",
        "encrypt.format=aes,cluster_size=4k,compat=0.10",
    ] {
        let luks = if options.contains("luks") { ",encrypt.iter-time=10" } else { "" };
        bench.make("qcow2", &format!("{options}{luks}"), "image.qcow2");
        let compare = ["compare", "--secret", "file=line", "--allow-external", "chain"];
        imgtool(compare).args(["image.qcow2", "disk.raw"]).within(bench.path()).ok();
        std::fs::remove_file(bench.file("image.qcow2")).unwrap();
    }
}

/// Version 1 of QCOW has the older AES alone.
#[test]
fn reads_encrypted_images_of_qcow_version_1() {
    require!("qemu-img", "qemu-io");
    let bench = Bench::new(3_000_320);
    bench.make("qcow", "encrypt.format=aes", "image.qcow1");
    bench.assert_read("image.qcow1");
    let image = "driver=qcow,encrypt.key-secret=s,file.filename=image.qcow1";
    for command in ["write -P 5 70k 9k", "write -P 6 1500k 512", "write -c -s disk.raw 128k 4k"] {
        bench.qemu("qemu-io", &["-c", command, "--image-opts", image]);
    }
    bench.qemu("qemu-img", &["convert", "-O", "raw", "--image-opts", image, "after.raw"]);
    for target in ["ours.raw", "ours.qcow2"] {
        let convert = ["convert", "--secret", "file=line", "--verify", "image.qcow1", target];
        imgtool(convert).within(bench.path()).ok();
        imgtool(["compare", target, "after.raw"]).within(bench.path()).ok();
    }
    imgtool(["compare", "disk.raw", "after.raw"]).within(bench.path()).go().exits(1);
    // No content is read.
    for command in ["info", "map", "measure", "check"] {
        imgtool([command, "image.qcow1"]).within(bench.path()).ok();
    }
    let info = imgtool(["info", "--output", "json", "image.qcow1"]).within(bench.path()).ok().json();
    assert_eq!(info["encrypted"], true);
    imgtool(["convert", "image.qcow1", "none.raw"]).within(bench.path()).go().exits(1).says("--secret file=");
    let convert = ["convert", "--secret", "file=wrong", "image.qcow1", "wrong.raw"];
    imgtool(convert).within(bench.path()).ok().says("can't tell a wrong passphrase");
    imgtool(["compare", "wrong.raw", "after.raw"]).within(bench.path()).go().exits(1);
}

/// QEMU compresses clusters of encrypted images without encrypting them.
#[test]
fn reads_compressed_zero_and_snapshot_clusters_of_encrypted_images() {
    require!("qemu-img", "qemu-io");
    let bench = Bench::new(1 << 20);
    for format in ["luks,encrypt.iter-time=10", "aes"] {
        let set = format!("encrypt.key-secret=s,encrypt.format={format}");
        bench.qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &set, "image.qcow2", "4M"]);
        let image = "driver=qcow2,encrypt.key-secret=s,file.filename=image.qcow2";
        for command in [
            "write -P 1 0 300k",
            "write -c -P 2 512k 64k",
            "write -c -s disk.raw 1M 1M",
            "write -z 64k 64k",
            "write -P 3 2100k 3k",
        ] {
            bench.qemu("qemu-io", &["-c", command, "--image-opts", image]);
        }
        bench.qemu("qemu-img", &["snapshot", "-c", "before", "--image-opts", image]);
        bench.qemu("qemu-img", &["convert", "-O", "raw", "--image-opts", image, "before.raw"]);
        bench.qemu("qemu-io", &["-c", "write -P 9 0 3M", "--image-opts", image]);
        bench.qemu("qemu-img", &["convert", "-O", "raw", "--image-opts", image, "after.raw"]);
        let read = ["compare", "--secret", "file=line", "image.qcow2", "after.raw"];
        imgtool(read).within(bench.path()).ok();
        let convert = ["convert", "--secret", "file=exact", "-l", "before", "image.qcow2", "ours.raw"];
        imgtool(convert).within(bench.path()).ok();
        imgtool(["compare", "ours.raw", "before.raw"]).within(bench.path()).ok();
        for name in ["image.qcow2", "ours.raw"] {
            std::fs::remove_file(bench.file(name)).unwrap();
        }
    }
}

#[test]
fn one_passphrase_opens_a_chain() {
    require!("qemu-img", "qemu-io");
    let bench = Bench::new(1 << 20);
    bench.make("qcow2", "encrypt.format=luks,encrypt.iter-time=10", "base.qcow2");
    let set = "encrypt.key-secret=s,encrypt.format=luks,encrypt.iter-time=10";
    let create = ["create", "-q", "-u", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", set];
    bench.qemu("qemu-img", &[&create[..], &["top.qcow2", "1M"]].concat());
    let top = "driver=qcow2,encrypt.key-secret=s,file.filename=top.qcow2,\
               backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=base.qcow2";
    bench.qemu("qemu-io", &["-c", "write -P 5 70k 9k", "--image-opts", top]);
    bench.qemu("qemu-img", &["convert", "-O", "raw", "--image-opts", top, "top.raw"]);
    let compare = ["compare", "--secret", "file=line", "--allow-external", "chain", "top.qcow2", "top.raw"];
    imgtool(compare).within(bench.path()).ok();
}

#[test]
fn a_passphrase_is_needed_and_checked_before_anything_is_written() {
    require!("qemu-img");
    let bench = Bench::new(100_352);
    bench.make("luks", "iter-time=10", "image.luks");
    bench.make("qcow2", "encrypt.format=luks,encrypt.iter-time=10", "image.qcow2");
    for image in ["image.luks", "image.qcow2"] {
        let convert = |secret: &[&str]| imgtool([&["convert"], secret, &[image, "out.raw"]].concat());
        convert(&[]).within(bench.path()).go().exits(1).says("--secret file=");
        convert(&["--secret", "file=wrong"]).within(bench.path()).go().exits(1).says("wrong passphrase");
        convert(&["--secret", "env=NO_SUCH"]).within(bench.path()).go().exits(2).says("NO_SUCH is not set");
        convert(&["--secret", "fd=977"]).within(bench.path()).go().exits(2).says("file descriptor 977");
        let stated = convert(&["--secret", PASSPHRASE]).within(bench.path()).go().exits(2);
        assert!(!stated.stderr.contains(PASSPHRASE), "{}", stated.stderr);
        // No content is read.
        for command in ["info", "map", "measure"] {
            imgtool([command, image]).within(bench.path()).ok();
        }
    }
    imgtool(["check", "image.qcow2"]).within(bench.path()).ok();
    // Content that was encrypted does not become readable without a word.
    let note = "the source is encrypted, the output is not";
    let convert = |to| imgtool(["convert", "--secret", "file=line", "image.qcow2", to]).within(bench.path());
    convert("clear.raw").ok().says(note);
    assert!(!convert("locked.luks").ok().stderr.contains(note));
    let by_name = ["checksum", "--secret", "env=WORD", "image.luks", "image.qcow2"];
    let sums = imgtool(by_name).env("WORD", PASSPHRASE).within(bench.path()).ok().text();
    let sums: Vec<_> = sums.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(sums[0], sums[1]);
    let by_descriptor = ["compare", "--secret", "fd=0", "image.luks", "disk.raw"];
    imgtool(by_descriptor).pipe_bytes(format!("{PASSPHRASE}\n")).within(bench.path()).ok();
}

#[test]
fn the_first_aes_of_qemu_gets_a_note_since_any_passphrase_opens_it() {
    require!("qemu-img");
    let bench = Bench::new(100_352);
    bench.make("qcow2", "encrypt.format=aes", "image.qcow2");
    let convert = |secret| imgtool(["convert", "--secret", secret, "image.qcow2", "out.raw"]);
    convert("file=wrong").within(bench.path()).ok().says("can't tell a wrong passphrase");
    imgtool(["convert", "image.qcow2", "none.raw"]).within(bench.path()).go().exits(1).says("--secret");
}

/// The facts are those of qemu-img, under the same keys.
#[test]
fn info_shows_the_facts_of_qemu_img() {
    require!("qemu-img");
    let bench = Bench::new(100_352);
    bench.make("luks", "iter-time=10,ivgen-alg=essiv,ivgen-hash-alg=sha256", "image.luks");
    bench.make("qcow2", "encrypt.format=luks,encrypt.iter-time=10", "image.qcow2");
    for (image, key) in
        [("image.luks", "/format-specific/data"), ("image.qcow2", "/format-specific/data/encrypt")]
    {
        let theirs = run_in("qemu-img", bench.path(), &["info", "--output=json", image]);
        let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();
        let ours = imgtool(["info", "--output", "json", image]).within(bench.path()).ok().json();
        assert_eq!(ours["encrypted"], true);
        // Objects are equal in any order of their keys.
        assert_eq!(ours.pointer(key), theirs.pointer(key), "{image}");
        assert_eq!(ours["virtual-size"], theirs["virtual-size"]);
    }
}

#[test]
fn luks_version_2_is_refused_by_name() {
    require!("cryptsetup");
    let bench = Bench::new(512);
    std::fs::File::create(bench.file("image.luks")).unwrap().set_len(32 << 20).unwrap();
    bench.cryptsetup(&["luksFormat", "--type", "luks2", "--pbkdf", "pbkdf2", "image.luks", "exact"]);
    for command in ["info", "checksum"] {
        imgtool([command, "image.luks"]).within(bench.path()).go().exits(1).says("LUKS version 2");
    }
}

/// cryptsetup makes containers without the device mapper, with hash functions and keys of its own.
#[test]
fn unlocks_containers_of_cryptsetup() {
    require!("cryptsetup");
    let bench = Bench::new(512);
    for (cipher, hash) in [("aes-xts-plain64", "sha512"), ("aes-cbc-essiv:sha256", "sha1")] {
        std::fs::write(bench.file("image.luks"), vec![0; 4 << 20]).unwrap();
        let format = ["luksFormat", "--type", "luks1", "-c", cipher, "-s", "256", "-h", hash];
        bench.cryptsetup(&[&format[..], &["image.luks", "exact"]].concat());
        bench.cryptsetup(&["luksAddKey", "--key-file", "exact", "image.luks", "wrong"]);
        for secret in ["file=exact", "file=wrong"] {
            imgtool(["checksum", "--secret", secret, "image.luks"]).within(bench.path()).ok();
        }
    }
}

/// qemu-img reads and checks our images, and cryptsetup unlocks our containers.
#[test]
fn qemu_and_cryptsetup_read_what_is_written() {
    require!("qemu-img", "cryptsetup");
    let bench = Bench::new(1_000_700);
    let quick = "encrypt.iterations=1000";
    for options in [
        "encrypt=luks",
        "encrypt.format=luks,cluster_size=512",
        "encrypt=luks,cluster_size=2M,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
        "encrypt=luks,compat=0.10,encrypt.cipher-alg=twofish-256",
        "encrypt=luks,extended_l2=on,encrypt.hash-alg=sha512,encrypt.cipher-alg=serpent-128",
    ] {
        let options = format!("{options},{quick}");
        let convert = ["convert", "--force", "--verify", "--target-secret", "file=line", "-o", &options];
        imgtool(convert).args(["disk.raw", "ours.qcow2"]).within(bench.path()).ok();
        bench.assert_qemu_reads("qcow2", "ours.qcow2", "disk.raw");
        let image = "driver=qcow2,encrypt.key-secret=s,file.filename=ours.qcow2";
        bench.qemu("qemu-img", &["check", "-q", "--image-opts", image]);
        bench.assert_read("ours.qcow2");
    }
    for options in ["", ",cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha1", ",cipher-alg=twofish-256"] {
        let options = format!("iterations=1000{options}");
        let convert = ["convert", "--force", "--verify", "--secret", "file=line", "-o", &options];
        imgtool(convert).args(["disk.raw", "ours.luks"]).within(bench.path()).ok();
        bench.assert_qemu_reads("luks", "ours.luks", "disk.raw");
        bench.assert_read("ours.luks");
        let test = ["luksOpen", "--test-passphrase", "--key-file", "exact", "ours.luks"];
        // cryptsetup needs the device mapper for other ciphers.
        if !options.contains("twofish") {
            run_in("cryptsetup", bench.path(), &test);
        }
        run_in("cryptsetup", bench.path(), &["luksDump", "ours.luks"]);
    }
}

/// From a pipe, into a pipe, compressed as a whole, and from one passphrase to another.
#[test]
fn containers_pass_through_pipes_and_change_their_passphrase() {
    let bench = Bench::new(300_100);
    let quick = ["-o", "iterations=1000"];
    let write = ["convert", "-f", "raw", "-O", "luks", "--secret", "file=line", "-", "-"];
    let raw = bench.file("disk.raw");
    let piped = imgtool([&write[..], &quick].concat()).pipe_from(&raw).within(bench.path()).ok();
    std::fs::write(bench.file("piped.luks"), piped.stdout).unwrap();
    bench.assert_read("piped.luks");
    let rekey =
        ["convert", "--secret", "file=exact", "--target-secret", "file=wrong", "piped.luks", "new.luks"];
    imgtool([&rekey[..], &quick].concat()).within(bench.path()).ok();
    imgtool(["checksum", "--secret", "file=line", "new.luks"]).within(bench.path()).go().exits(1);
    imgtool(["compare", "--secret", "file=wrong", "new.luks", "disk.raw"]).within(bench.path()).ok();
    let packed = ["convert", "--secret", "file=line", "disk.raw", "packed.luks.zst"];
    imgtool([&packed[..], &quick].concat()).within(bench.path()).ok();
    bench.assert_read("packed.luks.zst");
    let from_pipe = ["checksum", "--secret", "file=line", "-"];
    imgtool(from_pipe).pipe_from(&bench.file("new.luks")).within(bench.path()).go().exits(1);
    imgtool(from_pipe).pipe_from(&bench.file("piped.luks")).within(bench.path()).ok();
}

/// The content has the same digest for any number of threads, over a base, and with clusters of zeros.
#[test]
fn encrypted_overlays_store_the_difference() {
    require!("qemu-img", "qemu-io");
    let bench = Bench::new(3 << 20);
    let quick = "encrypt=luks,encrypt.iterations=1000";
    let base = ["convert", "--secret", "file=line", "-o", quick, "disk.raw", "base.qcow2"];
    imgtool(base).within(bench.path()).ok();
    std::fs::copy(bench.file("disk.raw"), bench.file("changed.raw")).unwrap();
    for command in ["write -P 7 100k 5k", "write -z 400k 300k", "write -P 8 2900k 1k"] {
        run_in("qemu-io", bench.path(), &["-f", "raw", "-c", command, "changed.raw"]);
    }
    for threads in ["1", "4"] {
        let over = ["convert", "--force", "--verify", "-m", threads, "--secret", "file=line", "-o", quick];
        let files = ["-B", "base.qcow2", "-F", "qcow2", "changed.raw", "top.qcow2"];
        imgtool([&over[..], &files].concat()).within(bench.path()).ok();
        let read = ["compare", "--secret", "file=line", "--allow-external", "chain"];
        imgtool([&read[..], &["top.qcow2", "changed.raw"]].concat()).within(bench.path()).ok();
        let len = std::fs::metadata(bench.file("top.qcow2")).unwrap().len();
        assert!(len < 3 << 20, "{len}");
        let top = "driver=qcow2,encrypt.key-secret=s,file.filename=top.qcow2,\
                   backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=base.qcow2";
        bench.qemu("qemu-img", &["convert", "-O", "raw", "--image-opts", top, "theirs.raw"]);
        imgtool(["compare", "theirs.raw", "changed.raw"]).within(bench.path()).ok();
    }
}

#[test]
fn every_format_becomes_a_container_and_back() {
    let bench = Bench::new(300_032);
    let quick = ["-o", "iterations=1000"];
    for format in ["raw", "qcow2", "vhdx", "vhd", "vdi", "vmdk", "vma"] {
        let (from, to) = (format!("from.{format}"), format!("to.{format}"));
        imgtool(["convert", "--force", "disk.raw", &from]).within(bench.path()).ok();
        let lock = ["convert", "--force", "--secret", "file=line", &from, "image.luks"];
        imgtool([&lock[..], &quick].concat()).within(bench.path()).ok();
        imgtool(["convert", "--secret", "file=line", "image.luks", &to]).within(bench.path()).ok();
        imgtool(["compare", &to, "disk.raw"]).within(bench.path()).ok();
    }
}

#[test]
fn encryption_is_refused_where_it_would_not_be_done() {
    let bench = Bench::new(100_352);
    for (args, code, reason) in [
        (&["-O", "raw", "--target-secret", "file=line"][..], 2, "without encryption"),
        (&["-O", "qcow2", "--target-secret", "file=line"], 2, "without encryption"),
        (&["-O", "qcow2", "-o", "encrypt=luks"], 2, "--target-secret"),
        (&["-O", "luks"], 2, "--target-secret"),
        (&["-O", "raw", "-o", "encrypt=luks"], 2, "--target-secret"),
        (&["-O", "raw", "-o", "encrypt=aes"], 2, "luks"),
        (&["-O", "vmdk", "-o", "encrypt=luks"], 2, "formats that can: qcow2, raw"),
        (&["-O", "vdi", "-o", "encrypt=luks"], 2, "vdi images can't be encrypted"),
        (&["-O", "vhd", "-o", "encrypt=luks"], 2, "formats that can"),
        (&["-O", "qcow2", "-o", "encrypt=luks", "-c", "--secret", "file=line"], 2, "compression"),
        (&["-O", "luks", "--secret", "file=missing"], 1, "missing"),
        (&["-O", "luks", "--secret", "file=line", "-o", "cipher-alg=cast5-128"], 2, "cipher-alg"),
    ] {
        let convert = imgtool([&["convert"], args, &["disk.raw", "out.img"]].concat());
        convert.within(bench.path()).go().exits(code).says(reason);
    }
}

/// A raw disk is encrypted as a LUKS container, whatever its name.
#[test]
fn an_encrypted_raw_disk_is_a_container() {
    require!("qemu-img");
    let bench = Bench::new(100_352);
    let secret = ["--target-secret", "file=line"];
    let options = ["-o", "encrypt=luks,iterations=1000,encrypt.cipher-alg=aes-128"];
    for (number, args) in
        [&["convert", "-O", "raw", "disk.raw", "0.img"][..], &["convert", "disk.raw", "1.raw"]]
            .iter()
            .enumerate()
    {
        imgtool([*args, &secret[..], &options[..]].concat()).within(bench.path()).ok();
        let name = ["0.img", "1.raw"][number];
        let info = imgtool(["info", "--output", "json", name]).within(bench.path()).ok().json();
        assert_eq!(info["format"], "luks");
        assert_eq!(info["format-specific"]["data"]["cipher-alg"], "aes-128");
        imgtool(["compare", "--secret", "file=line", name, "disk.raw"]).within(bench.path()).ok();
        bench.assert_qemu_reads("luks", name, "disk.raw");
    }
    let create =
        ["create", "-f", "raw", "-o", "encrypt=luks,iterations=1000", "--target-secret", "file=line"];
    imgtool([&create[..], &["new.raw", "64k"]].concat()).within(bench.path()).ok();
    imgtool(["check", "new.raw"]).within(bench.path()).ok();
}

/// The key is random, so equal disks have different images with the same content.
#[test]
fn two_encrypted_copies_differ() {
    let bench = Bench::new(100_352);
    for name in ["a.luks", "b.luks"] {
        let convert = ["convert", "--secret", "file=line", "-o", "iterations=1000", "disk.raw", name];
        imgtool(convert).within(bench.path()).ok();
    }
    let read = |name| std::fs::read(bench.file(name)).unwrap();
    let (a, b) = (read("a.luks"), read("b.luks"));
    let start = a.len() - 100_352;
    assert!(a[start..].iter().zip(&b[start..]).filter(|(a, b)| a == b).count() < 1000);
    imgtool(["compare", "--secret", "file=line", "a.luks", "b.luks"]).within(bench.path()).ok();
}
