//! The check of an image: its trailer, its tables, and the content of every chunk with its checksums.

use imgtool_core::unit_check::{UnitCheck, opened};
use imgtool_core::{CheckReport, Error, ErrorKind, Input, Memory, Result};

use crate::checksums::{READ_LEN, combine_zeros, mismatch, stored_mismatch};
use crate::chunks::{Chunk, Kind, Part};
use crate::decode::decoder_memory;
use crate::image::Image;
use crate::stored::digest_stored;

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a DMG image, is encrypted or compressed with LZFSE. Damage is not an
/// error: the report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let Some(image) = opened(Image::open(input, memory), &mut report)? else { return Ok(report) };
    image.refuse_lzfse()?;
    let mut check = UnitCheck::new(1, 0, image.input.len(), memory)?;
    let chunks = &image.chunks;
    let most = chunks.most(|chunk| chunk.len)
        + chunks.most(|chunk| chunk.stored_len)
        + chunks.most(|chunk| decoder_memory(chunk.kind))
        + READ_LEN;
    let _lease = memory.lease(most, "the chunks of a DMG image")?;
    let as_stored =
        |from, len, digest: &mut crc32fast::Hasher| digest_stored(&image.input, from, len, digest);
    if let Some(why) = stored_mismatch(&image, as_stored)? {
        report.corruption(why);
    }
    let mut content = Content { image: &image, buf: Vec::new(), budget: image.input.len() };
    for chunk in image.chunks.iter() {
        let name = format!("the chunk at sector {}", chunk.start / 512);
        match chunk.kind {
            Kind::Zero | Kind::Ignored => {}
            Kind::Raw => check.stored(name, chunk.file_offset, chunk.len, &mut report)?,
            _ => check.compressed(name, chunk.file_offset, chunk.stored_len, &mut report),
        }
    }
    let mut end = 0;
    for part in &image.chunks.parts {
        if part.start < end {
            // Its chunks are not decoded again: a small file could have thousands of such tables.
            report.corruption(format!("two tables map the sector {}", part.start / 512));
            continue;
        }
        end = part.start + part.len;
        content.check(part, &mut report)?;
    }
    check.finish(image.chunks.iter().count() as u64, &mut report);
    report.image_end_offset = Some(image.input.len());
    report.fragmented_clusters = None;
    Ok(report)
}

/// The content of an image, read for its checksums.
struct Content<'a> {
    image: &'a Image,
    buf: Vec<u8>,
    /// Number of stored bytes that may still be read. Chunks that share stored bytes exhaust it, so that a
    /// small file can't keep the check busy.
    budget: u64,
}

impl Content<'_> {
    /// Decodes the chunks of a part, and compares its checksum.
    fn check(&mut self, part: &Part, report: &mut CheckReport) -> Result<()> {
        let mut digest = crc32fast::Hasher::new();
        let (mut at, mut is_known) = (part.start, true);
        let end = part.start + part.len;
        while at < end {
            let image = self.image;
            let chunk = match image.chunks.at(at) {
                Ok(chunk) => chunk,
                Err(next) => {
                    (at, is_known) = (next, false);
                    continue;
                }
            };
            is_known &= chunk.start == at && chunk.end() <= end;
            if let Err(error) = self.digest(chunk, &mut digest) {
                if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) {
                    return Err(error);
                }
                report.corruption(format!("{:#}", image.in_chunk(error, chunk)));
                is_known = false;
            }
            at = chunk.end();
        }
        let found = digest.finalize();
        if let Some(expected) = part.crc.filter(|expected| is_known && *expected != found) {
            report.corruption(mismatch(part, found, expected));
        }
        Ok(())
    }

    /// Adds the content of a chunk to a checksum.
    fn digest(&mut self, chunk: &Chunk, digest: &mut crc32fast::Hasher) -> Result<()> {
        match chunk.kind {
            // 7-Zip accepts images of hdiutil, and leaves them out.
            Kind::Ignored => return Ok(()),
            Kind::Zero => {
                combine_zeros(digest, chunk.len);
                return Ok(());
            }
            _ => {}
        }
        self.budget = self
            .budget
            .checked_sub(chunk.stored_len)
            .ok_or_else(|| Error::malformed("chunks share stored bytes").at(chunk.file_offset))?;
        if chunk.kind == Kind::Raw {
            return digest_stored(&self.image.input, chunk.file_offset, chunk.len, digest);
        }
        // At most the maximum length of a chunk, so it fits.
        self.buf.resize(chunk.len as usize, 0);
        self.image.decode(chunk, &mut self.buf)?;
        digest.update(&self.buf);
        Ok(())
    }
}
