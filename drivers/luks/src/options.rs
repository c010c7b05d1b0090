//! Options of a new container, with the names that qemu-img uses.

use imgtool_core::{CreateOptions, Error, OptionSpec, Result};
use imgtool_crypt::{NewVolume, options};

/// Declared options.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    options::cipher("cipher-alg"),
    options::mode("cipher-mode"),
    options::iv("ivgen-alg"),
    options::iv_hash("ivgen-hash-alg"),
    options::hash("hash-alg"),
    options::iterations("iterations"),
    options::iter_time("iter-time"),
];

/// Parses the options.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for options that can't be combined, and for compression.
pub(crate) fn parse(options: &CreateOptions) -> Result<NewVolume> {
    if options.compress.is_some() {
        return Err(Error::usage("LUKS containers can't be compressed")
            .hint("compress inside the format that is encrypted, or choose another one"));
    }
    imgtool_crypt::options::parse(&options.values, "")
}
