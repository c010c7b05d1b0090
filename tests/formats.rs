//! Content through every format and in every form: files, pipes, compressed, sparse, huge.

mod bitmaps;
mod children;
mod containers;
mod encrypted;
mod existing_images;
mod file_system;
mod fixtures;
mod foreign;
mod huge;
mod joined;
mod matrix;
mod memory;
mod ova;
mod passphrases;
mod qcow2_chains;
mod qcow2_maps;
mod read_only;
mod same_bytes;
mod shared_blocks;
mod small;
mod sparse_size;
mod streams;
mod threads;
mod vmdk;
