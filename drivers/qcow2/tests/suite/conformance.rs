//! The conformance laws, for each kind of image that this driver writes.

use imgtool_qcow2::Qcow2Driver;
use imgtool_testing::conformance as laws;

use crate::tools::options;

#[test]
fn obeys_the_laws() {
    laws::all(&Qcow2Driver, &options(""));
}

#[test]
fn obeys_the_laws_with_small_clusters() {
    laws::all(&Qcow2Driver, &options("cluster_size=512"));
}

#[test]
fn obeys_the_laws_with_large_clusters() {
    laws::all(&Qcow2Driver, &options("cluster_size=2M,refcount_bits=1"));
}

#[test]
fn obeys_the_laws_with_zlib() {
    laws::all(&Qcow2Driver, &options("compress"));
}

#[test]
fn obeys_the_laws_with_zstd_in_small_clusters() {
    laws::all(&Qcow2Driver, &options("compress,compression_type=zstd,cluster_size=4k"));
}

#[test]
fn obeys_the_laws_with_subclusters() {
    laws::all(&Qcow2Driver, &options("extended_l2=on"));
}

#[test]
fn obeys_the_laws_with_version_2() {
    laws::all(&Qcow2Driver, &options("compat=0.10,cluster_size=4k"));
}
