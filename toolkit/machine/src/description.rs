//! A description of a machine in XML, whatever its dialect.

use imgtool_core::{Error, Machine, Result};

use crate::{libvirt, ovf, xml};

/// True if a file begins as an XML document does.
pub fn is_one(bytes: &[u8]) -> bool {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    bytes.trim_ascii_start().starts_with(b"<")
}

/// Parses an OVF descriptor or the XML of a libvirt domain, told apart by the outermost element.
///
/// # Errors
/// [`imgtool_core::ErrorKind::WrongFormat`] for another document; those of the dialect's `parse`.
pub fn parse(bytes: &[u8]) -> Result<Machine> {
    match xml::parse(bytes, "the description of the machine")?.name.as_str() {
        "Envelope" => Ok(ovf::parse(bytes, None)?.machine),
        "domain" => libvirt::parse(bytes),
        other => {
            let other = imgtool_core::error::escape_control(xml::shortened(other));
            Err(Error::wrong_format(format!("'{other}' is no description of a machine"))
                .hint("an OVF descriptor has the outermost element Envelope, a domain of libvirt has domain"))
        }
    }
}
