//! The conformance laws, for each kind of image that this driver writes.

use imgtool_qcow2::Qcow2Driver;
use imgtool_testing::conformance::{self as laws, Unlocked};

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

/// All laws but that of equal bytes: keys are random.
#[test]
fn obeys_the_laws_with_encryption() {
    let driver = Unlocked(Qcow2Driver);
    for set in [
        "",
        ",cluster_size=512",
        ",cluster_size=2M,encrypt.cipher-mode=cbc",
        ",extended_l2=on",
        ",compat=0.10",
    ] {
        let options = options(&format!("encrypt=luks,encrypt.iterations=1000{set}"));
        for image in laws::patterns() {
            laws::round_trip(&driver, &options, &image);
            laws::sequential_equals_random(&driver, &options, &image);
        }
        if !set.contains("2M") {
            // The law allows less than a few whole clusters of that size.
            laws::sparse_stays_sparse(&driver, &options);
        }
        laws::check_finds_nothing(&driver, &options);
    }
    let options = options("encrypt=luks,encrypt.iterations=1000");
    laws::sizes(&driver, &options);
    laws::parallel_reads(&driver, &options);
    laws::reads_stay_within_the_device(&driver, &options);
    laws::cancelled_copies_end(&driver, &options);
    laws::cancelled_opens_and_checks_end(&driver, &options);
    laws::open_ended_sources(&driver, &options);
    laws::existing_target_with_old_data(&driver, &options, &laws::mixed_image());
}
