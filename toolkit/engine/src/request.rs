//! [`Request`], everything that a user can request of a conversion, and [`OpenConversion`], the request with
//! its sources open.

use imgtool_core::{
    Attachment, CancelToken, Compress, Error, Location, Memory, NoProgress, OpenOptions, Registry, Result,
    Secrets, SnapshotChoice,
};
use imgtool_storage::{Outputs, Sharing};

use crate::bitmaps;
use crate::existing;
use crate::externals::{ExternalPolicy, PolicyOpener};
use crate::format::{FormatOptions, TargetFormat};
use crate::join;
use crate::layout::{DiskTarget, Layout, LayoutRequest};
use crate::monitor::Monitor;
use crate::open;
use crate::report::Note;
use crate::run::Plan;
use crate::sources::{self, OpenSource, SelectedDisk, SourceRequest};

/// A conversion as the user requests it.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Images to read.
    pub sources: Vec<SourceRequest>,
    /// Format of the sources, if the user states it.
    pub source_format: Option<String>,
    /// Settings for opening the sources.
    pub open: OpenSettings,
    /// True to join the disks of the sources, one after the other, into one disk.
    pub join: bool,
    /// Names of the disks to convert; empty for all.
    pub disks: Vec<String>,
    /// File or directory for all disks without a separate target.
    pub dest: Option<Location>,
    /// Disks with a separate target.
    pub disk_targets: Vec<DiskTarget>,
    /// Format of `dest`, if the user states it; otherwise the extension decides.
    pub format: Option<String>,
    /// Options of that format.
    pub options: FormatOptions,
    /// Compression inside the format, or of the whole output if the format has no compression.
    pub compress: Option<Compress>,
    /// Configurations for the output. They replace the configurations of the sources, unless
    /// `keep_attachments` is set.
    pub attachments: Vec<Attachment>,
    /// True if the caller will add configurations to [`OpenConversion::attachments`]. A format that can't
    /// store them is refused before any source is opened.
    pub wants_attachments: bool,
    /// True to keep the configurations of the sources in addition to `attachments`.
    pub keep_attachments: bool,
    /// `Some` to write into the existing file or device at `dest`; `Some(true)` if it is known to read as
    /// zeros.
    pub in_place: Option<bool>,
    /// True to replace existing files.
    pub overwrite: bool,
    /// True to leave out firmware variables and the state of a TPM, which the target makes itself, unless the user
    /// names the disks.
    pub leave_out_platform_state: bool,
    /// `Some` to copy the persistent bitmaps of the only source.
    pub bitmaps: Option<BrokenBitmaps>,
}

/// Treatment of bitmaps that can't be relied on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokenBitmaps {
    /// Refuse the conversion.
    Refuse,
    /// Leave them out, with a note.
    Skip,
}

/// Settings for opening the sources of a conversion; see [`OpenOptions`].
#[derive(Debug, Clone, Default)]
pub struct OpenSettings {
    /// True to restore the intact parts of damaged images.
    pub salvage: bool,
    /// True to open images that are marked as unsafe.
    pub force: bool,
    /// True to read files that other programs may write.
    pub force_share: bool,
    /// True to accept bytes after the end of an archive.
    pub ignore_trailing: bool,
    /// True to read files as they are; see [`OpenOptions::plain`].
    pub plain: bool,
    /// Name of the file in an archive that is the image; see [`OpenOptions::member`].
    pub member: Option<String>,
    /// Internal snapshot to read instead of the active state.
    pub snapshot: Option<SnapshotChoice>,
    /// Policy for the external files of images.
    pub policy: ExternalPolicy,
    /// Passphrases of encrypted images. Each is tried.
    pub secrets: Secrets,
    /// Ledger from which all parts of the conversion borrow.
    pub memory: Memory,
}

impl OpenSettings {
    /// Converts the settings into options for drivers, with `opener` as the opener of external files.
    pub fn options(&self, opener: &PolicyOpener) -> OpenOptions {
        let sharing = Sharing::forced(self.force_share);
        OpenOptions {
            salvage: self.salvage,
            force: self.force,
            force_share: self.force_share,
            ignore_trailing: self.ignore_trailing,
            plain: self.plain,
            member: self.member.clone(),
            snapshot: self.snapshot.clone(),
            secrets: self.secrets.clone(),
            externals: opener.borrowing(&self.memory).sharing(sharing).externals(),
            memory: self.memory.clone(),
            ..OpenOptions::default()
        }
    }
}

impl Request {
    /// Creates a request to convert one source into one destination. The source's content and the
    /// destination's extension determine the formats.
    pub fn new(source: impl Into<Location>, dest: impl Into<Location>) -> Self {
        Self { sources: vec![SourceRequest::new(source)], dest: Some(dest.into()), ..Self::default() }
    }

    /// Checks the request and opens the sources.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for an invalid request; any error from opening a source.
    pub fn open<'a>(&'a self, registry: &'a Registry, cancel: &CancelToken) -> Result<OpenConversion<'a>> {
        self.open_watched(registry, &NoProgress, cancel)
    }

    /// Like [`Request::open`]; `monitor` receives the progress of streams that are copied to temporary
    /// storage.
    ///
    /// # Errors
    /// Same as [`Request::open`].
    pub fn open_watched<'a>(
        &'a self,
        registry: &'a Registry,
        monitor: &dyn Monitor,
        cancel: &CancelToken,
    ) -> Result<OpenConversion<'a>> {
        let found = self.format_in_place(registry)?;
        let format = TargetFormat::choose(
            registry,
            self.format.as_deref().or(found),
            self.dest.as_ref(),
            self.compress.clone(),
            self.options.clone(),
        )?;
        self.check_join(&format)?;
        if (self.wants_attachments || !self.attachments.is_empty())
            && !format.driver.capabilities().attachments()
        {
            return Err(no_configurations(&format, registry));
        }
        let opener = PolicyOpener::new(registry.clone(), self.open.policy.clone());
        let sources = sources::open_sources(
            registry,
            self,
            &OpenOptions { bitmaps: self.bitmaps.is_some(), ..self.open.options(&opener) },
            &format,
            monitor,
            cancel,
        )?;
        open::check_member(self.open.member.as_deref(), sources.iter().map(|source| &source.opened))?;
        let outputs = self.outputs(&sources, &opener)?;
        let sources = if self.join { join::join(registry, sources)? } else { sources };
        Ok(OpenConversion {
            request: self,
            registry,
            format,
            sources,
            selected: Vec::new(),
            attachments: self.attachments.clone(),
            notes: Vec::new(),
            outputs,
        })
    }
}

impl Request {
    /// Returns the set of outputs, none of which may overwrite a file that the sources need.
    fn outputs(&self, sources: &[OpenSource], opener: &PolicyOpener) -> Result<Outputs> {
        let mut outputs = Outputs::new();
        for source in sources {
            outputs.protect(&source.opened.location, source.opened.identity.as_ref());
            source.opened.referenced_files().iter().try_for_each(|path| outputs.protect_path(path))?;
        }
        self.open.policy.paths.iter().try_for_each(|path| outputs.protect_allowed(path))?;
        let chosen = self.sources.iter().flat_map(|source| &source.backing.images);
        chosen.filter_map(|image| image.location.path()).try_for_each(|path| outputs.protect_path(path))?;
        for file in opener.opened() {
            outputs.protect(&file.location, file.identity.as_ref());
        }
        Ok(outputs)
    }

    /// Returns the format of the file or device that is to be written into, if nobody states it.
    fn format_in_place(&self, registry: &Registry) -> Result<Option<&'static str>> {
        let unstated = self.in_place.is_some() && self.format.is_none();
        let Some(dest) = self.dest.as_ref().filter(|_| unstated) else { return Ok(None) };
        Ok(existing::unless_named(registry, dest)?.map(|driver| driver.name()))
    }

    /// Refuses what makes no sense for a disk joined of several.
    fn check_join(&self, format: &TargetFormat) -> Result<()> {
        if !self.join || self.sources.len() < 2 {
            return Ok(());
        }
        let conflicts = [
            (self.open.snapshot.is_some(), "a snapshot belongs to one image, not to joined ones"),
            (self.bitmaps.is_some(), "bitmaps belong to one image, not to joined ones"),
            (format.writer.backing().is_some(), "joined images have no common backing image"),
        ];
        match conflicts.iter().find(|(conflict, _)| *conflict) {
            Some((_, message)) => Err(Error::usage(*message)),
            None => Ok(()),
        }
    }
}

/// Returns the error for configurations that the format can't store.
fn no_configurations(format: &TargetFormat, registry: &Registry) -> Error {
    let archives = registry.drivers().filter(|driver| driver.capabilities().attachments());
    let archives: Vec<_> = archives.map(|driver| driver.name()).collect();
    Error::usage(format!("{} images hold no configurations", format.driver.name()))
        .hint(format!("configurations go into archives: choose the format {}", archives.join(" or ")))
}

/// A conversion whose sources are open.
#[derive(Debug)]
pub struct OpenConversion<'a> {
    request: &'a Request,
    registry: &'a Registry,
    format: TargetFormat,
    sources: Vec<OpenSource>,
    selected: Vec<SelectedDisk>,
    /// Configurations for the output. The caller may add more.
    pub attachments: Vec<Attachment>,
    notes: Vec<Note>,
    outputs: Outputs,
}

impl OpenConversion<'_> {
    /// Returns the open sources.
    pub fn sources(&self) -> &[OpenSource] {
        &self.sources
    }

    /// Returns the format of the destination.
    pub fn format(&self) -> &TargetFormat {
        &self.format
    }

    /// Selects the disks and gives them their names in the output.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for a name that no disk has.
    pub fn select(&mut self) -> Result<()> {
        self.notes.clear();
        self.selected = sources::select(self.registry, &self.sources, &self.request.disks)?;
        // A package has a description, but no place for the state of a platform, unless the user wants it as
        // a disk.
        let is_package = self.format.is_archive() && self.format.driver.capabilities().container;
        if (is_package || self.request.leave_out_platform_state) && self.request.disks.is_empty() {
            let notes = sources::leave_out_platform_state(&self.sources, &mut self.selected);
            self.notes.extend(notes.into_iter().map(Note::Text));
        }
        if self.format.is_archive() {
            let apart = self.layout_request(Vec::new(), false).archives_apart();
            let notes = sources::name_for_archive(&self.sources, &mut self.selected, apart);
            self.notes.extend(notes.into_iter().map(Note::Text));
        }
        Ok(())
    }

    /// Returns the selected disks. The caller may rename them before [`OpenConversion::plan`].
    pub fn selected(&mut self) -> &mut [SelectedDisk] {
        &mut self.selected
    }

    /// Returns the request for the layout of the outputs, with these configurations.
    fn layout_request(&self, attachments: Vec<Attachment>, attachments_given: bool) -> LayoutRequest<'_> {
        LayoutRequest {
            registry: self.registry,
            sources: &self.sources,
            selected: &self.selected,
            format: &self.format,
            format_stated: self.request.format.is_some(),
            dest: self.request.dest.as_ref(),
            disk_targets: &self.request.disk_targets,
            disks_named: !self.request.disks.is_empty(),
            attachments,
            attachments_given,
            in_place: self.request.in_place,
            overwrite: self.request.overwrite,
        }
    }

    /// Decides every output. Selects the disks first, unless [`OpenConversion::select`] has done so.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] if the request does not match the disks of the sources.
    pub fn plan(mut self) -> Result<Plan> {
        if self.selected.is_empty() {
            self.select()?;
        }
        let own = self.attachments.is_empty();
        let mut attachments = std::mem::take(&mut self.attachments);
        if own || self.request.keep_attachments {
            for attachment in self.sources.iter().flat_map(OpenSource::attachments) {
                // A configuration from the user replaces a source's configuration with the same name.
                if own || !attachments.iter().any(|known| known.name == attachment.name) {
                    attachments.push(attachment.clone());
                }
            }
        }
        let mut layout: Layout = self.layout_request(attachments, !own).layout()?;
        layout.notes.extend(self.notes);
        if let Some(broken) = self.request.bitmaps {
            if self.request.open.snapshot.is_some() {
                return Err(Error::usage("the bitmaps belong to the active state, not to a snapshot"));
            }
            bitmaps::copy(&self.sources, broken, &mut layout)?;
        }
        Ok(Plan {
            layout,
            sources: self.sources,
            selected: self.selected,
            outputs: self.outputs,
            registry: self.registry.clone(),
            memory: self.request.open.memory.clone(),
        })
    }
}
