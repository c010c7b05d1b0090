//! Decompression of clusters.

use flate2::{Decompress, FlushDecompress};
use libdeflater::Decompressor;

/// Decodes the deflate stream in `stored` until `cluster` is full, or returns the reason for the failure.
/// Ignores what follows.
pub(crate) fn inflate(stored: &[u8], cluster: &mut [u8]) -> Result<(), &'static str> {
    // The faster decoder accepts only streams that end with the cluster.
    if Decompressor::new().deflate_decompress(stored, cluster) == Ok(cluster.len()) {
        return Ok(());
    }
    let mut inflate = Decompress::new(false);
    match inflate.decompress(stored, cluster, FlushDecompress::Finish) {
        Ok(_) if inflate.total_out() == cluster.len() as u64 => Ok(()),
        Ok(_) => Err("it decodes to less than a cluster"),
        Err(_) => Err("the data is damaged"),
    }
}
