//! Placeholder.
use imgtool_core::{CheckReport, Input, OpenOptions, Result};
pub(crate) fn check(_input: Input, _options: &OpenOptions) -> Result<CheckReport> {
    Ok(CheckReport::default())
}
