//! The laws that every driver obeys, with every kind of image that this one writes.

use imgtool_qcow2::Qcow2Driver;
use imgtool_toolkit::conformance as laws;

use crate::tools::options;

#[test]
fn the_laws_hold() {
    laws::all(&Qcow2Driver, &options(""));
}

#[test]
fn the_laws_hold_for_small_clusters() {
    laws::all(&Qcow2Driver, &options("cluster_size=512"));
}

#[test]
fn the_laws_hold_for_large_clusters() {
    laws::all(&Qcow2Driver, &options("cluster_size=2M,refcount_bits=1"));
}

#[test]
fn the_laws_hold_for_zlib() {
    laws::all(&Qcow2Driver, &options("compress"));
}

#[test]
fn the_laws_hold_for_zstd_in_small_clusters() {
    laws::all(&Qcow2Driver, &options("compress,compression_type=zstd,cluster_size=4k"));
}

#[test]
fn the_laws_hold_for_subclusters() {
    laws::all(&Qcow2Driver, &options("extended_l2=on"));
}

#[test]
fn the_laws_hold_for_version_2() {
    laws::all(&Qcow2Driver, &options("compat=0.10,cluster_size=4k"));
}
