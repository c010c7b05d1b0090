//! `vma verify`: reads everything, writes nothing.

use std::path::Path;

use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::{ImageSink, ImageSource, NoProgress};

use super::tally::Tally;
use super::{Failure, list, open};
use crate::args::ThreadArgs;
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::observe::{Nowhere, ObservedSink};
use crate::report;

/// What messages begin with.
const STEP: &str = "verify failed - ";

pub(super) fn run(file: &Path, verbose: bool) -> Result<Exit, Failure> {
    let interrupt = Interrupt::listen()?;
    let mut source = open(file, STEP)?;
    if verbose {
        report::print(&list::lines(source.header()))?;
    }
    let tally = Tally::new(&source.info().devices);
    let nowhere = Nowhere::default();
    let observed = ObservedSink::new(&nowhere, &tally);
    let sink: &dyn ImageSink = if verbose { &observed } else { &nowhere };
    let routes =
        source.info().devices.iter().map(|device| Route { from: device.id, to: device.id }).collect();
    let job = Job {
        routes,
        threads: ThreadArgs::default().count(),
        progress: &NoProgress,
        cancel: interrupt.token(),
    };
    pipeline::copy(&mut source, sink, &job).map_err(Failure::during(STEP))?;
    if verbose {
        report::print(&tally.totals())?;
    }
    Ok(Exit::Done)
}
