//! imgtool driver: Proxmox VE's VMA archive format.
