//! The `-o` options of [`crate::VmaDriver`].

use imgtool_core::{CreateOptions, Error, OptionKind, OptionSpec, Result};
use uuid::Uuid;

use crate::layout::SUB_BLOCK;

/// Default creation time, in seconds since 1970: 1980-01-01. It is not the current time, because equal input
/// must give equal bytes, and not 0, which readers do not expect.
pub(crate) const DEFAULT_CTIME: i64 = 315_532_800;

/// Options that the driver accepts.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "uuid",
        help: "the archive's UUID",
        default: "derived from names, sizes, configurations and creation time",
        kind: OptionKind::Text("a UUID such as 6ba7b810-9dad-41d1-80b4-00c04fd430c8"),
    },
    OptionSpec {
        name: "ctime",
        help: "the archive's creation time, seconds since 1970",
        default: "SOURCE_DATE_EPOCH, else 315532800 (1980-01-01)",
        kind: OptionKind::Integer,
    },
];

/// Parsed options of the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VmaOptions {
    /// UUID of the archive, or `None` to derive it from the content of the header.
    pub(crate) uuid: Option<Uuid>,
    /// Creation time, in seconds since 1970.
    pub(crate) ctime: i64,
    /// Length in bytes of the shortest run of zeros that is omitted, or `None` to store all zeros. See
    /// [`CreateOptions::zero_unit`].
    pub(crate) zero_unit: Option<u64>,
}

impl VmaOptions {
    pub(crate) fn parse(options: &CreateOptions) -> Result<Self> {
        if options.compress.is_some() {
            return Err(Error::unsupported("vma has no compression inside the format")
                .hint("compress the archive as a whole: give it a name that ends in .vma.zst"));
        }
        let uuid = match options.values.text("uuid") {
            None => None,
            Some(text) => Some(Uuid::parse_str(text).map_err(|_| {
                Error::usage(format!(
                    "option 'uuid' expects a UUID such as {}, not '{text}'",
                    Uuid::NAMESPACE_DNS
                ))
            })?),
        };
        let ctime = options.values.integer("ctime").or(options.source_date_epoch).unwrap_or(DEFAULT_CTIME);
        Ok(Self { uuid, ctime, zero_unit: options.zero_unit(SUB_BLOCK) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)], epoch: Option<i64>) -> Result<VmaOptions> {
        let options = CreateOptions::parse("vma", OPTIONS, pairs.iter().copied())?;
        VmaOptions::parse(&CreateOptions { source_date_epoch: epoch, ..options })
    }

    #[test]
    fn ctime_option_overrides_source_date_epoch() {
        assert_eq!(parse(&[], None).expect("none").ctime, DEFAULT_CTIME);
        assert_eq!(parse(&[], Some(7)).expect("epoch").ctime, 7);
        assert_eq!(parse(&[("ctime", "-3")], Some(7)).expect("both").ctime, -3);
        let uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        assert_eq!(parse(&[("uuid", uuid)], None).expect("uuid").uuid, Some(Uuid::NAMESPACE_DNS));
    }

    #[test]
    fn rejects_malformed_values() {
        assert!(parse(&[("uuid", "x")], None).is_err());
        assert!(parse(&[("ctime", "1.5")], None).is_err());
    }
}
