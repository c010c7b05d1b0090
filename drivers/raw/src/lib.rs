//! imgtool driver: Raw disk images and block devices.
