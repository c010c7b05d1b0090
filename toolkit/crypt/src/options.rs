//! Options of new encrypted images, declared once for every driver that writes them. qcow2 puts "encrypt." in
//! front of their names, as qemu-img does.

use std::time::Duration;

use imgtool_core::{Error, OptionKind, OptionSpec, OptionValues, Result};

use crate::create::{DEFAULT_SLOT_TIME, Iterations, MAX_TIMED_ITERATIONS, MIN_ITERATIONS, NewVolume};
use crate::hash::Hash;
use crate::spec::CipherSpec;

/// Maximum time of the iterations in milliseconds. Our limit: nobody waits longer for a disk.
const MAX_TIME: u64 = 60_000;

/// Option for the cipher. Ciphers with short blocks, and keys that QEMU can't store, are only read.
pub const fn cipher(name: &'static str) -> OptionSpec {
    let kind = OptionKind::OneOf(&[
        "aes-128",
        "aes-256",
        "serpent-128",
        "serpent-256",
        "twofish-128",
        "twofish-256",
    ]);
    OptionSpec { name, help: "cipher, with the length of its key in bits", default: "aes-256", kind }
}

/// Option for the mode. Modes that show equal blocks of a disk are only read.
pub const fn mode(name: &'static str) -> OptionSpec {
    OptionSpec { name, help: "mode of the cipher", default: "xts", kind: OptionKind::OneOf(&["xts", "cbc"]) }
}

/// Option for the initialisation vectors.
pub const fn iv(name: &'static str) -> OptionSpec {
    let kind = OptionKind::OneOf(&["plain64", "essiv"]);
    OptionSpec { name, help: "rule for the initialisation vectors of sectors", default: "plain64", kind }
}

/// Option for the hash function of the rule `essiv`.
pub const fn iv_hash(name: &'static str) -> OptionSpec {
    let kind = OptionKind::OneOf(&["sha256"]);
    OptionSpec { name, help: "hash function of the rule essiv", default: "sha256", kind }
}

/// Option for the hash function of the key derivation.
pub const fn hash(name: &'static str) -> OptionSpec {
    let kind = OptionKind::OneOf(&["sha1", "sha256", "sha512"]);
    OptionSpec { name, help: "hash function that turns the passphrase into a key", default: "sha256", kind }
}

/// Option for the work of the key derivation.
pub const fn iterations(name: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        help: "work of the key derivation as a number, the same on every machine",
        default: "by time",
        kind: OptionKind::Size { min: MIN_ITERATIONS as u64, max: MAX_TIMED_ITERATIONS as u64, unit: 1 },
    }
}

/// Option for the time of the key derivation.
pub const fn iter_time(name: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        help: "work of the key derivation in milliseconds on this machine, at least 600000 iterations",
        default: "2000",
        kind: OptionKind::Size { min: 1, max: MAX_TIME, unit: 1 },
    }
}

/// Returns the volume that the options with `prefix` before their names describe.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a cipher that the vectors do not fit.
pub fn parse(values: &OptionValues, prefix: &str) -> Result<NewVolume> {
    let text = |name: &str| values.text(&format!("{prefix}{name}"));
    let (algorithm, bits) =
        text("cipher-alg").unwrap_or("aes-256").rsplit_once('-').unwrap_or(("aes", "256"));
    let mode = text("cipher-mode").unwrap_or("xts");
    let iv = match (text("ivgen-alg"), text("ivgen-hash-alg")) {
        (Some("essiv"), hash) => format!("essiv:{}", hash.unwrap_or("sha256")),
        (_, Some(_)) => {
            return Err(Error::usage(format!("{prefix}ivgen-hash-alg needs {prefix}ivgen-alg=essiv")));
        }
        (rule, None) => rule.unwrap_or("plain64").to_owned(),
    };
    let halves = if mode == "xts" { 2 } else { 1 };
    let key_len = bits.parse::<usize>().unwrap_or(256) / 8 * halves;
    let cipher = CipherSpec::parse(algorithm, &format!("{mode}-{iv}"), key_len)
        .map_err(|e| Error::usage(e.message().to_owned()))?;
    Ok(NewVolume {
        cipher,
        hash: text("hash-alg").and_then(Hash::by_name).unwrap_or(Hash::Sha256),
        iterations: parse_iterations(values, prefix)?,
    })
}

fn parse_iterations(values: &OptionValues, prefix: &str) -> Result<Iterations> {
    let number = |name: &str| values.size(&format!("{prefix}{name}"));
    match (number("iterations"), number("iter-time")) {
        (Some(_), Some(_)) => {
            Err(Error::usage(format!("{prefix}iterations and {prefix}iter-time exclude each other")))
        }
        (Some(count), None) => Ok(Iterations::Count(u32::try_from(count).unwrap_or(MAX_TIMED_ITERATIONS))),
        (None, Some(time)) => Ok(Iterations::Time(Duration::from_millis(time))),
        (None, None) => Ok(Iterations::Time(DEFAULT_SLOT_TIME)),
    }
}
