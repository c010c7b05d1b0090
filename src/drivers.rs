//! The drivers of this program. A driver from outside the repository is one more line here.

use imgtool_toolkit::Registry;

/// All drivers; raw last, because it takes whatever no other knows.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    imgtool_qcow2::register(&mut registry);
    imgtool_vhdx::register(&mut registry);
    imgtool_vma::register(&mut registry);
    imgtool_raw::register(&mut registry);
    registry
}
