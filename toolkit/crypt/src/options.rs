//! Options of new encrypted images, declared once for every driver that writes them. qcow2 puts "encrypt." in
//! front of their names, as qemu-img does.

use imgtool_core::{Error, OptionKind, OptionSpec, OptionValues, Result};

use crate::create::{DEFAULT_ITERATIONS, MIN_ITERATIONS, NewVolume};
use crate::hash::Hash;
use crate::spec::CipherSpec;

/// Maximum number of iterations of a new slot. Our limit: ten seconds of work.
const MAX_ITERATIONS: u64 = 10_000_000;

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
        help: "work of the key derivation: more makes guessing a passphrase slower",
        default: "600000",
        kind: OptionKind::Size { min: MIN_ITERATIONS as u64, max: MAX_ITERATIONS, unit: 1 },
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
    let iterations = values.size(&format!("{prefix}iterations")).and_then(|n| u32::try_from(n).ok());
    Ok(NewVolume {
        cipher,
        hash: text("hash-alg").and_then(Hash::by_name).unwrap_or(Hash::Sha256),
        iterations: iterations.unwrap_or(DEFAULT_ITERATIONS),
    })
}
