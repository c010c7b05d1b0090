//! Systems without confinement.

use std::path::PathBuf;

use imgtool_engine::Reach;

/// Does nothing.
pub(super) fn enter(_writable: Option<&[PathBuf]>, _network: super::Network) {}

/// Returns false: nothing is closed.
pub(super) fn narrow(_reach: &Reach) -> bool {
    false
}

/// Returns nothing.
pub(super) fn enforced() -> Vec<&'static str> {
    Vec::new()
}
