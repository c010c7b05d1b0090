//! Tests against qemu-nbd, nbdkit and a server that misbehaves.
#![allow(clippy::unwrap_used)]

mod hostile;
mod servers;

use imgtool_core::{Error, Memory, RandomInput, Url, UrlOpener};
use imgtool_nbd::NbdOpener;

fn open(url: &str) -> Result<RandomInput, Error> {
    NbdOpener.open(&Url::parse(url).unwrap(), &Memory::default())?.into_random()
}
