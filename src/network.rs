//! Settings of the user for servers: certificates and headers.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use imgtool_core::{Error, Location, Registry, Result, ResultExt};
use imgtool_http::{HttpOpener, Settings};

use crate::args::InputArgs;

/// Maximum length of a file of certificates or headers in bytes. Our limit: all authorities of the internet
/// take 250 KiB.
const MAX_LEN: u64 = 1 << 20;

/// Gives the opener of URLs the certificates and headers that the user names.
///
/// # Errors
/// If a file can't be read, or is invalid.
pub fn add(mut registry: Registry, args: &InputArgs) -> Result<Registry> {
    let mut settings = Settings::default();
    for path in &args.cacert {
        read(path).and_then(|pem| settings.trust(&pem)).in_file(path)?;
    }
    for path in &args.header {
        let text = read(path).and_then(|text| {
            String::from_utf8(text).map_err(|_| Error::usage("a file of headers must be UTF-8"))
        });
        text.and_then(|text| settings.add_headers(&text)).in_file(path)?;
    }
    registry.register_opener(HttpOpener::new(settings));
    Ok(registry)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io("open", e))?;
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", e))?;
    match bytes.len() as u64 > MAX_LEN {
        true => Err(Error::limit(format!("is longer than {MAX_LEN} bytes")).path(Location::from(path))),
        false => Ok(bytes),
    }
}
