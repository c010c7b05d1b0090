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

    /// Runs cryptsetup with little work in the key derivation.
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

/// Every cipher, mode and rule for vectors that qemu-img 10 makes a container with, except that keys of 192
/// bits work in XTS mode only.
#[test]
fn reads_every_cipher_of_qemu_img() {
    require!("qemu-img");
    let bench = Bench::new(300_032);
    let mut count = 0;
    let ciphers = [
        ("aes-128", 16),
        ("aes-192", 24),
        ("aes-256", 32),
        ("serpent-128", 16),
        ("serpent-192", 24),
        ("serpent-256", 32),
        ("twofish-128", 16),
        ("twofish-192", 24),
        ("twofish-256", 32),
        ("cast5-128", 16),
    ];
    for (cipher, key_len) in ciphers {
        for mode in ["xts", "cbc", "ctr", "ecb"] {
            for iv in ["plain", "plain64", "essiv:md5", "essiv:sha256"] {
                let is_cast5 = cipher.starts_with("cast5");
                if key_len == 24 && mode != "xts" || is_cast5 && (mode == "xts" || iv == "essiv:sha256") {
                    continue;
                }
                let iv = iv.replace(':', ",ivgen-hash-alg=");
                let set = format!("iter-time=10,cipher-alg={cipher},cipher-mode={mode},ivgen-alg={iv}");
                bench.make("luks", &set, "image.luks");
                bench.assert_read("image.luks");
                count += 1;
            }
        }
    }
    assert_eq!(count, 6 * 16 + 3 * 4 + 3 * 3);
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
    for (cipher, hash) in [("aes-xts-plain64", "sha512"), ("serpent-cbc-essiv:sha256", "sha1")] {
        std::fs::write(bench.file("image.luks"), vec![0; 4 << 20]).unwrap();
        let format = ["luksFormat", "--type", "luks1", "-c", cipher, "-s", "256", "-h", hash];
        bench.cryptsetup(&[&format[..], &["image.luks", "exact"]].concat());
        bench.cryptsetup(&["luksAddKey", "--key-file", "exact", "image.luks", "wrong"]);
        for secret in ["file=exact", "file=wrong"] {
            imgtool(["checksum", "--secret", secret, "image.luks"]).within(bench.path()).ok();
        }
    }
}
