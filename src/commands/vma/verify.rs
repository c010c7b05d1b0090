//! `vma verify`: reads and checks a whole archive.

use std::path::Path;

use imgtool_core::{ImageSource, Lane, NoProgress};
use imgtool_engine::digest;
use imgtool_engine::pipeline::Tap;
use imgtool_storage::FileWatch;

use super::tally::Tally;
use super::{Failure, absent_clusters, list, open, output};
use crate::args::ThreadArgs;
use crate::exit::Exit;
use crate::interrupt::Interrupt;

/// Prefix of error messages.
const STEP: &str = "verify failed - ";

pub(super) fn run(file: &Path, verbose: bool) -> Result<Exit, Failure> {
    let interrupt = Interrupt::listen()?;
    let archive = open(file, STEP)?;
    if verbose {
        output::print_bytes(&list::lines(archive.source.header()))?;
    }
    let tally = Tally::new(&archive.source.info().devices);
    let taps: &[&dyn Tap] = if verbose { &[&tally] } else { &[] };
    let threads = ThreadArgs::default().count();
    digest::read_all(
        &*archive.source,
        Lane(0),
        taps,
        threads,
        &NoProgress,
        interrupt.token(),
        &archive.memory,
    )
    .map_err(Failure::during(STEP))?;
    archive.watch.iter().flat_map(FileWatch::changes).for_each(|change| output::note(&change));
    archive.source.notes().iter().for_each(|text| output::note(text));
    if verbose {
        output::print(&tally.totals(absent_clusters(&archive.source)))?;
    }
    Ok(Exit::Done)
}
