//! Descriptions of a virtual machine, read into [`imgtool_core::Machine`] and written from it.
//!
//! | module | dialect |
//! |---|---|
//! | [`ovf`] | the descriptor of an OVF package or OVA |
//! | [`libvirt`] | the domain XML of libvirt |
//! | [`proxmox`] | `qemu-server.conf` of Proxmox VE, as VMA archives have it |
//!
//! Each dialect has a `parse`, which takes untrusted bytes, and a `print`, whose result lists what the
//! dialect has no place for. Nothing that runs a program on the host or takes a device of the host is carried
//! over. The crate opens no file.

pub mod description;
pub mod libvirt;
pub mod ovf;
pub mod proxmox;
mod xml;

/// A description, and what it does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Printed {
    /// Text of the description.
    pub text: String,
    /// Parts of the machine that the dialect has no place for, one line each.
    pub lost: Vec<String>,
}

/// Memory in bytes of a machine whose memory is unknown. Our choice: enough for the installer of every
/// system.
pub const DEFAULT_MEMORY: u64 = 2 << 30;
