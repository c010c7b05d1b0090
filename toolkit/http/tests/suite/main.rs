//! Tests against a server that misbehaves.
#![allow(clippy::unwrap_used)]

mod answers;
mod parts;
mod redirects;

use std::io::Read;

use imgtool_core::location::Url;
use imgtool_core::{Error, Input, Memory, RandomInput, UrlOpener};
use imgtool_http::{HttpOpener, Settings};
use imgtool_testing::http::Server;

/// Content of a file: 5 MiB and some bytes, so that it has several blocks and an odd end.
fn content() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..(5 << 20) + 123).map(|_| next()).collect()
}

fn open(url: &str) -> Result<Input, Error> {
    open_with(url, Settings::default())
}

fn open_with(url: &str, settings: Settings) -> Result<Input, Error> {
    HttpOpener::new(settings).open(&Url::parse(url).unwrap(), &Memory::default())
}

fn random(server: &Server) -> RandomInput {
    open(&server.url("/disk.raw")).unwrap().into_random().unwrap()
}

/// Reads the whole file by position, in two parts.
fn read_all(input: &RandomInput) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; usize::try_from(input.len()).unwrap()];
    let middle = bytes.len() / 2;
    let (first, second) = bytes.split_at_mut(middle);
    input.read_exact_at(second, middle as u64)?;
    input.read_exact_at(first, 0)?;
    Ok(bytes)
}

/// Reads the whole file as a stream.
fn stream(input: Input) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.into_stream().map_err(std::io::Error::from)?.read_to_end(&mut bytes).map(|_| bytes)
}
