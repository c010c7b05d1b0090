//! [`Plan`], which copies the content, finishes the outputs, verifies them and gives them their names.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use imgtool_core::memory::{COPY_FLOOR, shares};
use imgtool_core::{
    CancelToken, DeviceId, Doubt, Error, Lane, Lease, Loss, LossClass, Memory, OpenOptions, Output, Registry,
    Remedy, Result, ResultExt, Secrets, SinkDevice, TableMemory,
};
use imgtool_storage::{Outputs, Sharing, os};

use crate::digest::ContentDigest;
use crate::externals::{ExternalPolicy, PolicyOpener};
use crate::inspect::Inspector;
use crate::layout::{Destination, Layout, PlannedOutput};
use crate::monitor::{Counter, Monitor, Phase, Reach};
use crate::open::Opened;
use crate::pipeline::{self, Job, Route, Tap, Target};
use crate::rate_limit::RateLimit;
use crate::report::{DiskReport, FileReport, Note, OutputReport, Report};
use crate::sinks::{self, OpenSink, SinkSettings};
use crate::sources::{self, OpenSource, SelectedDisk};
use crate::{names, open, space, verify};

mod gauge;

/// Note for an encrypted source whose content is now readable by everyone.
const DECRYPTED: &str = "the source is encrypted, the output is not (encrypt=luks in qcow2 and raw, and the format \
                         luks encrypt it)";

/// A conversion that is ready to run. Every output is decided, but not created yet.
#[derive(Debug)]
pub struct Plan {
    /// All outputs.
    pub layout: Layout,
    /// Open sources.
    pub sources: Vec<OpenSource>,
    /// Disks selected for the conversion.
    pub selected: Vec<SelectedDisk>,
    /// Set of outputs, which refuses to overwrite a source.
    pub outputs: Outputs,
    /// Registry of drivers.
    pub registry: Registry,
    /// Ledger from which all parts of the run borrow.
    pub memory: Memory,
}

/// Settings for running a plan.
#[derive(Debug, Clone, Default)]
pub struct RunOptions<'a> {
    /// Time from which the report counts, before the sources were opened; `None` for the begin of the run.
    pub begun: Option<Instant>,
    /// Number of worker threads; 0 for one per processor.
    pub threads: usize,
    /// True to write into targets that are in use, and to skip the check for free space.
    pub force: bool,
    /// True to read backing images of outputs that another program may write.
    pub force_share: bool,
    /// True to write a raw disk to the front of an existing target of any sufficient size.
    pub accept_larger: bool,
    /// True to make empty outputs, without copying content.
    pub without_content: bool,
    /// True to read every output back and compare it before it gets its final name.
    pub verify: bool,
    /// Maximum number of bytes of data to read per second, from the sources and, for verification, from the
    /// outputs. Holes and known zeros do not count; the devices of a stream that are not copied do.
    pub bytes_per_second: Option<u64>,
    /// Policy for the external files that backing images of outputs name.
    pub base_policy: ExternalPolicy,
    /// Passphrases of the encrypted backing images of outputs.
    pub base_secrets: Secrets,
    /// Observers of every piece. The lane of a disk equals its slot.
    pub taps: Vec<&'a dyn Tap>,
    /// Judge of the finished outputs.
    pub inspector: Option<&'a dyn Inspector>,
    /// Token that cancels the run.
    pub cancel: CancelToken,
}

impl Plan {
    /// Makes all outputs of the layout.
    ///
    /// # Errors
    /// The first failure. No new file has its final name then, and a target that was overwritten in place is
    /// incomplete ([`Monitor::left_incomplete`]).
    pub fn run(mut self, options: &RunOptions<'_>, monitor: &dyn Monitor) -> Result<Report> {
        monitor.outputs(self.outputs.cleaner());
        self.check(options, monitor)?;
        let (shares, tables) = self.lease_tables()?;
        let directories = self.layout.directory.iter().chain(&self.layout.machine_directories);
        directories.into_iter().try_for_each(|directory| self.outputs.directory(directory))?;
        let memory = self.memory.shared_by(self.layout.outputs.len());
        let base_opener = PolicyOpener::new(self.registry.clone(), options.base_policy.clone());
        let base_opener = base_opener.borrowing(&memory).sharing(Sharing::forced(options.force_share));
        let base_options = OpenOptions {
            externals: base_opener.externals(),
            secrets: options.base_secrets.clone(),
            memory,
            force_share: options.force_share,
            ..OpenOptions::default()
        };
        let settings = SinkSettings {
            registry: &self.registry,
            base_opener: &base_opener,
            base_options: &base_options,
            force: options.force,
            accept_larger: options.accept_larger,
            overwrite: self.layout.overwrite,
            without_content: options.without_content,
            shares: &shares,
        };
        let sinks = sinks::open_sinks(&self.layout, &self.selected, &mut self.outputs, settings);
        let overwritten = self.outputs.overwritten();
        let sinks =
            sinks.inspect_err(|_| overwritten.iter().for_each(|lost| monitor.left_incomplete(lost)))?;
        let existed = |(planned, _): &(&PlannedOutput, &OpenSink)| {
            matches!(planned.destination, Destination::Existing { .. } | Destination::Image { .. })
        };
        let planned = self.layout.outputs.iter().zip(&sinks).filter(existed);
        // An existing image that is replaced is a new file until then.
        let in_place: Vec<Output> = planned
            .map(|(planned, open)| (planned, open.output.clone()))
            .filter(|(planned, output)| {
                output.capacity().is_some() || matches!(planned.destination, Destination::Image { .. })
            })
            .map(|(_, output)| output)
            .collect();
        let result = self.fill(&sinks, tables, &base_opener, options, monitor);
        if result.is_err() {
            for output in in_place.iter().filter(|output| output.was_changed()) {
                monitor.left_incomplete(output.location());
            }
            overwritten.iter().for_each(|lost| monitor.left_incomplete(lost));
        }
        result
    }

    /// Refuses a plan in which a selected disk has no source, or is not in exactly one output.
    fn check_slots(&self) -> Result<()> {
        let mut placed = vec![0; self.selected.len()];
        for slot in self.layout.outputs.iter().flat_map(|output| &output.disks) {
            *placed
                .get_mut(slot.index())
                .ok_or_else(|| Error::usage("the plan places a disk that is not selected"))? += 1;
        }
        if placed.iter().any(|count| *count != 1) {
            return Err(Error::usage("the plan does not place every selected disk in one output"));
        }
        match self.selected.iter().find(|disk| disk.source >= self.sources.len()) {
            Some(disk) => Err(Error::usage("the plan selects a disk of no source").device(&*disk.name)),
            None => Ok(()),
        }
    }

    /// Refuses outputs that can't be made, before any output is created.
    fn check(&mut self, options: &RunOptions<'_>, monitor: &dyn Monitor) -> Result<()> {
        self.check_slots()?;
        if options.verify {
            self.layout.outputs.iter().try_for_each(verify::refuse_unreadable)?;
        }
        if options.verify && self.layout.outputs.iter().any(|output| output.destination.is_stream()) {
            return Err(Error::usage("an output in a pipe can't be read back to verify it"));
        }
        for output in &self.layout.outputs {
            if let Some(backing) = output.format.writer.backing() {
                let base = sinks::backing_path(&output.destination.location(), &backing.name)?;
                base.path().map_or(Ok(()), |path| self.outputs.protect_path(path))?;
                // Nor may an output be an image below the base: the new image would lead back to itself. Only
                // the names in the base's header are known without a permission to open more.
                let below = sinks::files_below(&self.registry, &base, &backing);
                below.iter().try_for_each(|path| self.outputs.protect_path(path))?;
            }
        }
        let requests = self.layout.requests(&self.selected);
        self.outputs.check(&requests).map_err(|e| self.explain_existing(e))?;
        if options.force {
            return Ok(());
        }
        space::check(&self.layout, &self.sources, &self.selected, monitor)
    }

    /// Completes the error for a file that exists in the directory of a machine: it may be the disk of another one.
    fn explain_existing(&self, error: Error) -> Error {
        let machine = self.sources.iter().find(|source| source.holds_machine());
        let taken = matches!(error.remedy(), Some(Remedy::Overwrite));
        let (Some(directory), Some(machine), true) = (&self.layout.directory, machine, taken) else {
            return error;
        };
        let name = names::safe(&open::stem(&self.registry, &machine.opened.location), "vm");
        let path = directory.join(name);
        if path.exists() {
            return error;
        }
        error.with_remedy(Remedy::ChooseDirectory { path: path.to_string_lossy().into_owned() })
    }

    /// Borrows the memory for the tables of all outputs. Returns the share of each output.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] if less is free, or nothing would be left for a copy.
    fn lease_tables(&self) -> Result<(Vec<u64>, Lease)> {
        let outputs = self.layout.outputs.iter();
        let needs: Vec<TableMemory> =
            outputs.map(|output| sinks::table_memory(output, &self.selected)).collect::<Result<_>>()?;
        let shares = shares(self.memory.tables(), &needs);
        let sum = shares.iter().fold(0, |sum: u64, share| sum.saturating_add(*share));
        if self.memory.free() >= sum.saturating_add(COPY_FLOOR) {
            return Ok((shares, self.memory.lease(sum, "the tables of the outputs")?));
        }
        Err(match self.layout.outputs.as_slice() {
            [output] => {
                self.memory.refusal(sum, "the tables of the output").path(output.destination.location())
            }
            outputs => self.memory.refusal(sum, format_args!("the tables of {} outputs", outputs.len())),
        })
    }

    /// Fills the outputs and gives them their names. `tables` is the memory for the sinks' tables.
    fn fill(
        mut self,
        sinks: &[OpenSink],
        tables: Lease,
        base_opener: &PolicyOpener,
        options: &RunOptions<'_>,
        monitor: &dyn Monitor,
    ) -> Result<Report> {
        let begun = options.begun.unwrap_or_else(Instant::now);
        let files = self.create_files()?;
        monitor.opened(&self.reach(sinks, base_opener, options));
        let handles: Vec<Output> = sinks.iter().map(|open| open.output.clone()).collect();
        let limit = options.bytes_per_second.map(|rate| RateLimit::new(rate, options.cancel.clone()));
        let counter = Counter::begin(monitor, Phase::Convert, self.gauge(sinks, options), limit.as_ref());
        let digest = ContentDigest::new();
        self.copy(sinks, options, &counter, &digest)?;
        drop(tables);
        let disks = self.disk_reports(&counter);
        self.check_stream_sizes(sinks, &disks, options.force || options.accept_larger)?;
        let expected = verify::Expected {
            digest: &digest,
            disks: &disks,
            selected: &self.selected,
            base_opener,
            base_secrets: &options.base_secrets,
            threads: options.threads,
            cancel: options.cancel.clone(),
            limit: limit.as_ref(),
            memory: self.memory.shared_by(self.layout.outputs.len()),
        };
        if options.verify {
            monitor.end();
            self.verify_files(&files)?;
            verify::read_back(&self.layout, sinks, &expected, monitor)?;
        }
        let notes = self.inspect(sinks, &expected, options)?;
        self.commit(sinks, &files, options, monitor)?;
        if !options.verify {
            monitor.end();
        }
        Ok(Report {
            outputs: self.output_reports(&handles, &disks),
            files: self.file_reports(),
            losses: self.losses(),
            notes,
            verified: options.verify,
            data: counter.data(),
            elapsed: begun.elapsed(),
        })
    }

    /// Shows the finished outputs to the inspector. Returns all notes.
    fn inspect(
        &self,
        sinks: &[OpenSink],
        expected: &verify::Expected<'_>,
        options: &RunOptions<'_>,
    ) -> Result<Vec<Note>> {
        let mut notes = self.notes(sinks);
        if let Some(inspector) = options.inspector {
            let finished = verify::finished(&self.layout, sinks, expected)?;
            notes.extend(inspector.inspect(&finished)?.into_iter().map(Note::Text));
        }
        Ok(notes)
    }

    /// Returns the files that the run may still open. Only verification opens files: the backing images of
    /// the outputs, which `base_opener` has opened before.
    fn reach(&self, sinks: &[OpenSink], base_opener: &PolicyOpener, options: &RunOptions<'_>) -> Reach {
        let policy = &options.base_policy;
        let mut reads = BTreeSet::new();
        let bases = sinks.iter().flat_map(OpenSink::backing_images);
        reads.extend(bases.clone().filter(|_| options.verify).map(Path::to_owned));
        if options.verify {
            // The files of a backing image that consists of several.
            let opened = base_opener.opened();
            reads.extend(opened.iter().filter_map(|file| file.location.path().map(Path::to_owned)));
        }
        let images = self.layout.outputs.iter().filter_map(|output| match &output.destination {
            Destination::Image { path, .. } => Some(path.as_path()),
            _ => None,
        });
        for named in bases.chain(images).filter(|_| options.verify) {
            reads.extend(policy.paths.iter().chain(&policy.directories).cloned());
            // The policy allows the directory of the file itself, wherever a link to it is.
            let real = std::fs::canonicalize(named).ok().filter(|_| policy.chain);
            reads.extend(real.as_deref().and_then(Path::parent).map(Path::to_owned));
        }
        Reach {
            files: self.outputs.file_directories(),
            reserved: self.outputs.reserved_directories(),
            parents: self.outputs.parent_directories(),
            reads,
        }
    }

    /// Creates the files for configurations.
    fn create_files(&mut self) -> Result<Vec<Output>> {
        let mut files = Vec::new();
        for file in &self.layout.files {
            let links = self.layout.links(&file.path);
            let output = self.outputs.create_linked(&file.path, self.layout.overwrite, links)?;
            output.write_at(&file.attachment.data, 0)?;
            files.push(output);
        }
        Ok(files)
    }

    /// Reads the files for configurations back and compares them.
    fn verify_files(&self, files: &[Output]) -> Result<()> {
        let mut planned = self.layout.files.iter().zip(files);
        planned.try_for_each(|(file, output)| verify::same_bytes(output, &file.attachment.data))
    }

    /// Copies the content of every source into the sinks, and finishes them.
    fn copy(
        &self,
        sinks: &[OpenSink],
        options: &RunOptions<'_>,
        counter: &Counter<'_>,
        digest: &ContentDigest,
    ) -> Result<()> {
        let mut taps = options.taps.clone();
        if options.verify {
            taps.push(digest);
        }
        let sources = if options.without_content { &[] } else { self.sources.as_slice() };
        let job = |index: usize| Job {
            targets: sinks.iter().map(|open| Target::Sink(&*open.sink)).collect(),
            routes: self.routes(index),
            taps: taps.clone(),
            threads: sources[index].opened.workers(options.threads),
            progress: counter,
            cancel: options.cancel.clone(),
            memory: self.memory.clone(),
        };
        let mut surveyed = Vec::new();
        for (index, source) in sources.iter().enumerate() {
            let job = job(index);
            pipeline::check_memory(&*source.opened.image, &job).in_file(&source.opened.location)?;
            surveyed.extend(self.surveyed(source, &job)?);
        }
        counter.survey(surveyed);
        for open in sinks {
            let preamble = open.sink.begin()?;
            if !preamble.is_empty() {
                open.output.write_at(&preamble, 0)?;
            }
        }
        for (index, source) in sources.iter().enumerate() {
            pipeline::copy(&*source.opened.image, &job(index)).in_file(&source.opened.location)?;
            counter.end_part();
            source.opened.release();
        }
        for open in sinks {
            let end = open.sink.end()?;
            if !end.is_empty() {
                open.output.write_at(&end, open.output.reached())?;
            }
            open.sink.finish()?;
        }
        Ok(())
    }

    /// Refuses a disk whose size was unknown until its stream ended, if its existing target has another size.
    fn check_stream_sizes(
        &self,
        sinks: &[OpenSink],
        disks: &[DiskReport],
        accept_larger: bool,
    ) -> Result<()> {
        for (planned, open) in self.layout.outputs.iter().zip(sinks) {
            for slot in planned.disks.iter().filter(|slot| self.selected[slot.index()].device.open_ended) {
                sinks::check_stream_size(planned, &open.output, &disks[slot.index()], accept_larger)?;
            }
        }
        Ok(())
    }

    fn routes(&self, source: usize) -> Vec<Route> {
        let way = |(slot, disk): (imgtool_core::Slot, &SelectedDisk)| {
            let mut outputs = self.layout.outputs.iter().enumerate();
            outputs.find_map(|(target, output)| {
                let number = output.disks.iter().position(|known| *known == slot)?;
                // The number of devices in an archive is bounded, so it fits.
                let to = SinkDevice(u32::try_from(number).ok()?);
                Some(Route { from: disk.device.id, target, to, lane: Lane(slot.0) })
            })
        };
        sources::of_source(&self.selected, source).filter_map(way).collect()
    }

    /// Flushes all outputs, then gives them their names. The user can cancel the slow flush, but not the
    /// quick naming.
    fn commit(
        &mut self,
        sinks: &[OpenSink],
        files: &[Output],
        options: &RunOptions<'_>,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        for output in sinks.iter().flat_map(OpenSink::outputs).chain(files) {
            output.sync()?;
            options.cancel.check()?;
        }
        let mut outputs = Some(std::mem::take(&mut self.outputs));
        monitor.name_outputs(&mut || outputs.take().map_or(Ok(()), Outputs::commit))?;
        match outputs {
            None => Ok(()),
            Some(_) => Err(Error::refused("the monitor did not name the outputs")),
        }
    }

    /// Collects the notes of the plan, the drivers and the outputs, and the notes about the sources.
    fn notes(&self, sinks: &[OpenSink]) -> Vec<Note> {
        let to_stdout = self.layout.outputs.iter().any(|output| output.destination.is_stdout());
        let closed = (to_stdout && os::is_stdout_closed()).then_some(Note::StdoutClosed);
        let planned = self.layout.notes.iter().cloned();
        let read = self.sources.iter().flat_map(|source| source.opened.image.notes());
        let decrypted = self.decrypts().then(|| Note::Text(DECRYPTED.to_owned()));
        planned
            .chain(decrypted)
            .chain(read.map(Note::Text))
            .chain(sinks.iter().flat_map(|open| open.sink.notes()).map(Note::Text))
            .chain(self.outputs.swept().iter().cloned().map(Note::Swept))
            .chain(self.outputs.without_safe_naming().map(Into::into).map(Note::UnsafeNaming))
            .chain(self.outputs.doubts().iter().cloned().map(Note::Text))
            .chain(self.source_changes(sinks).into_iter().map(Note::SourceChanged))
            .chain(closed)
            .collect()
    }

    /// True if an encrypted source goes into an output that is not encrypted.
    fn decrypts(&self) -> bool {
        let is_encrypted = |source: &OpenSource| {
            let mut facts = source.opened.image.info().facts.iter();
            facts.any(|fact| fact.key == "encrypted" && fact.value == true)
        };
        self.sources.iter().any(is_encrypted)
            && self.layout.outputs.iter().any(|output| !output.format.writer.encrypts())
    }

    /// Describes what has changed in the sources and in the backing images of the outputs since they were
    /// opened.
    fn source_changes(&self, sinks: &[OpenSink]) -> Vec<String> {
        let sources = self.sources.iter().map(|source| &source.opened);
        let mut changes: Vec<String> = Vec::new();
        for change in
            sources.chain(sinks.iter().filter_map(|open| open.base.as_ref())).flat_map(Opened::changes)
        {
            // Sources share the opener of the files that they name.
            if !changes.contains(&change) {
                changes.push(change);
            }
        }
        changes
    }

    fn disk_reports(&self, counter: &Counter<'_>) -> Vec<DiskReport> {
        let of = |(lane, disk): (Lane, &SelectedDisk)| {
            let (virtual_size, zero) = counter.totals(lane);
            DiskReport { name: disk.name.clone(), virtual_size, zero }
        };
        Lane::first(self.selected.len()).zip(&self.selected).map(of).collect()
    }

    fn output_reports(&self, handles: &[Output], disks: &[DiskReport]) -> Vec<OutputReport> {
        let of = |(planned, output): (&PlannedOutput, &Output)| OutputReport {
            location: planned.destination.location(),
            format: planned.format.driver.name(),
            compression: planned.format.outer.map(|outer| outer.compression.name()),
            disks: planned.disks.iter().map(|slot| disks[slot.index()].clone()).collect(),
            bitmaps: planned.bitmaps.len(),
            stored: stored_len(planned, &self.selected, output.written()),
        };
        self.layout.outputs.iter().zip(handles).map(of).collect()
    }

    fn file_reports(&self) -> Vec<FileReport> {
        let of = |file: &crate::layout::PlannedFile| FileReport {
            location: (&file.path).into(),
            name: file.attachment.name.clone(),
            len: file.attachment.data.len() as u64,
        };
        self.layout.files.iter().map(of).collect()
    }

    fn losses(&self) -> Vec<(String, Loss)> {
        let mut losses = Vec::new();
        for (index, source) in self.sources.iter().enumerate() {
            let disk = |id: DeviceId| {
                sources::of_source(&self.selected, index)
                    .map(|(_, disk)| disk)
                    .find(|disk| disk.device.id == id)
            };
            for loss in source.opened.image.losses() {
                losses.extend(disk(loss.device).map(|disk| (disk.name.clone(), loss)));
            }
            for doubt in source.opened.image.doubts() {
                // An empty range means that the disk as a whole can't be proven complete.
                losses.extend(disk(doubt.device).map(|disk| {
                    let guest = disk.device.size..disk.device.size;
                    let Doubt { device, reason } = doubt;
                    let (class, offset) = (LossClass::Unverified, None);
                    let loss = Loss { class, offset, compressed_offset: None, device, guest, reason };
                    (disk.name.clone(), loss)
                }));
            }
        }
        joined(losses)
    }
}

/// Joins ranges of a disk that touch and have the same class. The first reason stays.
fn joined(losses: Vec<(String, Loss)>) -> Vec<(String, Loss)> {
    let mut joined: Vec<(String, Loss)> = Vec::new();
    for (name, loss) in losses {
        match joined.last_mut() {
            Some((known, last))
                if *known == name
                    && last.class == loss.class
                    && !last.guest.is_empty()
                    && !loss.guest.is_empty()
                    && last.guest.end == loss.guest.start =>
            {
                last.guest.end = loss.guest.end;
                if last.reason != loss.reason && !last.reason.ends_with(MORE_REASONS) {
                    last.reason += MORE_REASONS;
                }
            }
            _ => joined.push((name, loss)),
        }
    }
    joined
}

/// End of the reason of a joined range, if its parts had different ones.
const MORE_REASONS: &str = ", and other reasons";

/// Returns the number of bytes that the files of a new image take on disk; `written` for other outputs.
fn stored_len(planned: &PlannedOutput, selected: &[SelectedDisk], written: u64) -> u64 {
    match &planned.destination {
        Destination::New(path) => {
            let companions = planned.companions(selected);
            let len = |path: &Path| std::fs::metadata(path).map(|meta| os::allocated_len(&meta));
            let beside: u64 = companions.iter().filter_map(|path| len(path).ok()).sum();
            len(path).map_or(written, |main| main + beside)
        }
        Destination::Existing { .. }
        | Destination::Image { .. }
        | Destination::Stream(_)
        | Destination::Open(_) => written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_joined_within_a_class() {
        let loss = |class, guest, reason: &str| {
            let device = DeviceId(0);
            let (offset, compressed_offset, reason) = (None, None, reason.to_owned());
            ("a".to_owned(), Loss { class, offset, compressed_offset, device, guest, reason })
        };
        let (lost, unverified) = (LossClass::Lost, LossClass::Unverified);
        let found = joined(vec![
            loss(lost, 0..10, "x"),
            loss(lost, 10..20, "y"),
            loss(lost, 20..30, "z"),
            loss(unverified, 30..40, "x"),
            loss(lost, 50..60, "x"),
        ]);
        let ranges: Vec<_> = found.iter().map(|(_, loss)| (loss.class, loss.guest.clone())).collect();
        assert_eq!(ranges, [(lost, 0..30), (unverified, 30..40), (lost, 50..60)]);
        assert_eq!(found[0].1.reason, "x, and other reasons");
    }
}
