//! The end of a stream that is read by position: the directory's marker, and the footer.

use imgtool_core::zero::is_zero;
use imgtool_core::{Error, RandomInput, Remedy, Result};

use super::FileSettings;
use crate::layout::SECTOR_SIZE;
use crate::layout::hosted::{self, GD_AT_END, Header};
use crate::layout::marker::{Kind, Marker};

/// Number of bytes at the end of the file in which the footer must be. Our limit: qemu-img writes up to 64 KiB of
/// zeros behind it.
const TAIL: u64 = 128 << 10;

/// Checks that the directory of a stream has its marker. Without it, the header or the footer could point into
/// a grain, whose bytes would be taken for the directory.
fn check_directory_marker(input: &RandomInput, directory: u64) -> Result<()> {
    let marker = directory.saturating_sub(1).saturating_mul(SECTOR_SIZE);
    let bytes = input.read_vec(marker, SECTOR_SIZE as usize)?;
    match bytes.first_chunk().map(Marker::decode) {
        Some(Marker::Metadata { kind: Kind::Directory, .. }) => Ok(()),
        _ => Err(Error::malformed(format!("the grain directory at sector {directory} has no marker"))
            .at(marker)
            .remedied_by(Remedy::Salvage("copy the file again, or use a backup".into()))),
    }
}

/// Returns the header with the place of the grain directory. If the directory is at the end of a stream, the
/// footer has that place. In a salvage, also returns the reason why the stream is not proven complete.
pub(super) fn complete(
    input: &RandomInput,
    header: &Header,
    settings: FileSettings<'_>,
) -> Result<(Header, Option<String>)> {
    let is_in_front = header.directory < header.overhead;
    match header.directory {
        GD_AT_END => read(input, header, settings),
        // The field `overhead` is informative, and may be missing.
        _ if !header.markers || is_in_front || header.overhead == 0 => Ok((header.clone(), None)),
        directory => {
            check_directory_marker(input, directory)?;
            read(input, header, settings)
        }
    }
}

/// Reads the footer of a stream: the last sector but one, unless zeros follow the end of the stream, which some
/// programs write. Nothing else may follow, or a stream in a pipe would have other content.
fn read(
    input: &RandomInput,
    header: &Header,
    settings: FileSettings<'_>,
) -> Result<(Header, Option<String>)> {
    let missing = || {
        Error::corrupt("the stream has no footer, which has the place of its tables")
            .at(input.len())
            .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into()))
    };
    // From a sector's start to the end of the file: at most 129 KiB.
    let start = (input.len() / SECTOR_SIZE * SECTOR_SIZE).saturating_sub(TAIL);
    let tail = input.read_vec(start, (input.len() - start) as usize)?;
    let (sectors, _) = tail.as_chunks::<512>();
    let is_footer =
        |pair: &[[u8; 512]]| marker(&pair[0]) == Some(Kind::Footer) && pair[1].starts_with(hosted::MAGIC);
    let used = sectors.windows(2).rposition(is_footer).ok_or_else(missing)? + 1;
    let at = start + used as u64 * SECTOR_SIZE;
    let footer = Header::decode(&sectors[used]).map_err(|fault| fault.of("footer", at))?;
    check(header, &footer).map_err(|error| error.at(at))?;
    let rest = &tail[(used + 1) * SECTOR_SIZE as usize..];
    let end = check_end(rest, settings.ignore_trailing || settings.salvage);
    let mut doubt = None;
    match end.map_err(|error| error.at(at + SECTOR_SIZE)) {
        Err(error) if settings.salvage => doubt = Some(format!("unverified: {}", error.message())),
        end => end?,
    }
    if !settings.salvage {
        check_gap(input, &footer, at / SECTOR_SIZE - 1)?;
    }
    if footer.directory != header.directory {
        check_directory_marker(input, footer.directory)?;
    }
    // Streams have their descriptor behind the header.
    let Header { descriptor_offset, descriptor_size, .. } = *header;
    Ok((Header { descriptor_offset, descriptor_size, ..footer }, doubt))
}

fn marker(sector: &[u8; 512]) -> Option<Kind> {
    match sector.first_chunk().map(Marker::decode) {
        Some(Marker::Metadata { kind, .. }) => Some(kind),
        _ => None,
    }
}

/// Checks that a footer agrees with the header.
fn check(header: &Header, footer: &Header) -> Result<()> {
    if footer.directory == GD_AT_END {
        return Err(Error::malformed("the footer does not have the place of the grain directory"));
    }
    let same = |header: &Header| {
        (header.capacity, header.grain_size, header.table_entries, header.compressed, header.markers)
    };
    let is_known = header.directory != GD_AT_END;
    if same(footer) != same(header) || is_known && footer.directory != header.directory {
        return Err(Error::malformed("the footer contradicts the header"));
    }
    Ok(())
}

/// Checks that between the directory and the footer's marker, at a sector, are only markers without content.
fn check_gap(input: &RandomInput, footer: &Header, marker_at: u64) -> Result<()> {
    let end = footer.directory.saturating_add((footer.directory_entries() * 4).div_ceil(SECTOR_SIZE));
    let gap = marker_at.checked_sub(end).map(|sectors| sectors.saturating_mul(SECTOR_SIZE));
    let is_empty = match gap.filter(|gap| *gap <= TAIL) {
        Some(gap) => {
            let bytes = input.read_vec(marker_at * SECTOR_SIZE - gap, gap as usize)?;
            bytes.as_chunks::<512>().0.iter().all(|sector| marker(sector) == Some(Kind::Progress))
        }
        None => false,
    };
    if is_empty {
        return Ok(());
    }
    Err(Error::corrupt("the footer of the stream does not follow its directory")
        .at(marker_at * SECTOR_SIZE)
        .remedied_by(Remedy::Salvage("copy the file again, or use a backup".into())))
}

/// Checks the bytes behind a footer: progress markers, the end marker and zeros may follow, nothing else.
fn check_end(rest: &[u8], ignore_trailing: bool) -> Result<()> {
    let (sectors, _) = rest.as_chunks::<512>();
    let is_progress = |sector: &&[u8; 512]| marker(sector) == Some(Kind::Progress);
    let markers = sectors.iter().take_while(is_progress).count();
    let Some(last) = sectors.get(markers) else {
        return Err(Error::corrupt("the stream ends early: it has no end marker")
            .remedied_by(Remedy::Salvage("it was cut short: copy it again, or use a backup".into())));
    };
    let has_end = marker(last) == Some(Kind::End);
    if has_end && (ignore_trailing || is_zero(&rest[(markers + 1) * SECTOR_SIZE as usize..])) {
        return Ok(());
    }
    Err(Error::corrupt("bytes follow the end of the stream").remedied_by(Remedy::IgnoreTrailing))
}
