//! Reads, converts and compares disk images and whole-VM archives: raw, qcow2, VHDX, Proxmox VMA.
//!
//! ```no_run
//! # fn main() -> imgtool::Result<()> {
//! let image = imgtool::open("vm.vma.zst")?;
//! for disk in image.disks()? {
//!     let mut boot_sector = [0; 512];
//!     disk.read_at(&mut boot_sector, 0)?;
//!     println!("{}: {} bytes, {:?}", disk.name(), disk.size(), disk.extents(0..disk.size())?.first());
//! }
//! let report = imgtool::convert("vm.vma.zst", "disks/").format("qcow2").run()?;
//! println!("{} bytes in {:?}", report.virtual_size(), report.elapsed);
//! # Ok(())
//! # }
//! ```
//!
//! [`open`] and [`convert`] support all formats of the program. For more control, use [`engine`], which plans
//! and runs a request. To add a driver of your own, implement the traits of [`contracts`] and add it with
//! [`Registry::register`] to the drivers that [`registry`] returns.
//!
//! The library prints nothing, has no global state and no `unsafe`. Without the feature `cli` (on by
//! default), it does not depend on crates that only the program needs.

use std::sync::Arc;
use std::time::Instant;

pub use imgtool_core as contracts;
pub use imgtool_core::{
    Attachment, CancelToken, Disk, DiskReader, Error, ErrorKind, Extent, ExtentKind, ImageInfo, Lane,
    Location, Loss, OpenOptions, Registry, Remedy, Result,
};
pub use imgtool_engine as engine;
pub use imgtool_engine::{
    DiskReport, FileReport, Gauge, LaneInfo, Monitor, Note, OutputReport, Pace, Phase, Quality, Report,
    Request, RunOptions, TimeLeft, Work, WorkUnit,
};

use imgtool_core::{Compress, ImageSource, Memory, NoProgress};
use imgtool_engine::Opened;

/// Returns the drivers of the program, and its openers of URLs (with the feature `net`). The driver for raw
/// disks accepts every image, but is chosen only if no other driver recognises it.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    // Before qcow2, which claims all versions in order to refuse the unknown ones.
    imgtool_qcow1::register(&mut registry);
    imgtool_qcow2::register(&mut registry);
    imgtool_vhdx::register(&mut registry);
    imgtool_vhd::register(&mut registry);
    imgtool_vmdk::register(&mut registry);
    imgtool_vdi::register(&mut registry);
    imgtool_parallels::register(&mut registry);
    imgtool_qed::register(&mut registry);
    imgtool_bochs::register(&mut registry);
    imgtool_cloop::register(&mut registry);
    imgtool_dmg::register(&mut registry);
    imgtool_luks::register(&mut registry);
    imgtool_vma::register(&mut registry);
    imgtool_ova::register(&mut registry);
    imgtool_raw::register(&mut registry);
    #[cfg(feature = "net")]
    {
        registry.register_opener(imgtool_http::HttpOpener::default());
        registry.register_opener(imgtool_nbd::NbdOpener);
    }
    registry
}

/// Opens an image or archive of any supported format for reading. Removes outer compression (zstd, gzip,
/// lzop, xz, bzip2), and copies an image that can only be read as a stream to temporary storage.
///
/// External files that the image names (a backing image) are not opened: see [`open_with`].
///
/// # Errors
/// If the image can't be opened, or no driver recognises it.
pub fn open(location: impl Into<Location>) -> Result<Image> {
    open_with(&registry(), location, None, &OpenOptions::default())
}

/// Like [`open`], with other drivers, an explicit format, or options. To allow external files, set
/// [`OpenOptions::externals`] with [`engine::externals::PolicyOpener`]. With [`OpenOptions::salvage`], an
/// archive can only be read in one pass: use [`Conversion::salvage`] to restore its disks.
///
/// # Errors
/// Same as [`open`].
pub fn open_with(
    registry: &Registry,
    location: impl Into<Location>,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Image> {
    let cancel = CancelToken::new();
    imgtool_engine::open::open_random(registry, &location.into(), format, options, &cancel).map(Image)
}

/// An open image or archive.
#[derive(Debug)]
pub struct Image(Opened);

impl Image {
    /// Returns all devices, in the image's order: disks, and the state of a running guest if an archive
    /// contains it ([`Disk::device`] tells them apart). Each handle keeps the image open.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an archive whose data is too scattered for random access.
    pub fn disks(&self) -> Result<Vec<Disk>> {
        Disk::all(&self.0.image)
    }

    /// Returns the disk called `name`.
    ///
    /// # Errors
    /// Same as [`Image::disks`]; [`ErrorKind::Usage`] if no disk has that name. The hint lists all names.
    pub fn disk(&self, name: &str) -> Result<Disk> {
        Disk::by_name(Arc::clone(&self.0.image), name)
    }

    /// Returns the name of the image's format ("qcow2").
    pub fn format(&self) -> &'static str {
        self.0.driver.name()
    }

    /// Returns the metadata: devices, configurations, facts, notes, and references to external files.
    pub fn info(&self) -> &ImageInfo {
        self.0.image.info()
    }

    /// Returns the image itself, for code that uses the traits of [`contracts`].
    pub fn source(&self) -> &Arc<dyn ImageSource> {
        &self.0.image
    }
}

/// Prepares a conversion of the image at `source` into the file or directory `dest`; [`Conversion::run`] runs
/// it. The extension of `dest` determines the format, unless [`Conversion::format`] sets it. A string is a
/// path or URL; for a pipe, pass [`Location::Stdin`] or [`Location::Stdout`].
pub fn convert(source: impl Into<Location>, dest: impl Into<Location>) -> Conversion<'static> {
    Conversion {
        registry: registry(),
        request: Request::new(source, dest),
        options: RunOptions::default(),
        monitor: &NoProgress,
    }
}

/// A builder for a conversion.
#[derive(Debug)]
#[must_use = "nothing happens before `run`"]
pub struct Conversion<'a> {
    registry: Registry,
    request: Request,
    options: RunOptions<'a>,
    monitor: &'a dyn Monitor,
}

impl<'a> Conversion<'a> {
    /// Sets the format of the output ("qcow2").
    pub fn format(mut self, name: impl Into<String>) -> Self {
        self.request.format = Some(name.into());
        self
    }

    /// Sets an option of the format (`cluster_size` to `2M`).
    pub fn option(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.options.pairs.push((key.into(), value.into()));
        self
    }

    /// Selects a disk of an archive; call it once per disk. By default, all disks are converted.
    pub fn disk(mut self, name: impl Into<String>) -> Self {
        self.request.disks.push(name.into());
        self
    }

    /// Compresses the output: inside the format if the format can compress, otherwise as a whole.
    pub fn compressed(mut self) -> Self {
        self.request.compress = Some(Compress::default());
        self
    }

    /// Allows the source to use other files in or below its directory, such as a backing image.
    pub fn allow_chain(mut self) -> Self {
        self.request.open.policy.chain = true;
        self
    }

    /// Replaces existing files after all new ones are complete.
    pub fn overwrite(mut self) -> Self {
        self.request.overwrite = true;
        self
    }

    /// Reads each output back and compares it with the source, before it gets its final name.
    pub fn verify(mut self) -> Self {
        self.options.verify = true;
        self
    }

    /// Sets the number of worker threads; by default one per processor.
    pub fn threads(mut self, threads: usize) -> Self {
        self.options.threads = threads;
        self
    }

    /// Limits the resident memory to `bytes`; by default [`contracts::memory::DEFAULT_LIMIT`], 256 MiB. A
    /// conversion that needs more is refused, and the error names the limit that would suffice
    /// ([`Remedy::AllowMemory`]).
    pub fn memory(mut self, bytes: u64) -> Self {
        self.request.open.memory = Memory::new(bytes);
        self
    }

    /// Reports progress to `monitor`.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.monitor = monitor;
        self
    }

    /// Stops with [`ErrorKind::Cancelled`] when `cancel` is cancelled.
    pub fn cancelled_by(mut self, cancel: CancelToken) -> Self {
        self.options.cancel = cancel;
        self
    }

    /// Uses these drivers instead of the built-in ones ([`registry`]).
    pub fn drivers(mut self, registry: Registry) -> Self {
        self.registry = registry;
        self
    }

    /// Restores the intact parts of a damaged source; [`Report::losses`] lists the lost ranges.
    pub fn salvage(mut self) -> Self {
        self.request.open.salvage = true;
        self
    }

    /// Changes other settings of the request.
    pub fn with_request(mut self, change: impl FnOnce(&mut Request)) -> Self {
        change(&mut self.request);
        self
    }

    /// Changes other settings of the run.
    pub fn with_options(mut self, change: impl FnOnce(&mut RunOptions<'a>)) -> Self {
        change(&mut self.options);
        self
    }

    /// Runs the conversion. The outputs get their final names together, after all of them are complete. After
    /// an error or a cancellation, no new file is left.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for an invalid request, [`ErrorKind::Refused`] if an output already exists,
    /// [`ErrorKind::Cancelled`] after a cancellation, and any error of the source or the target.
    pub fn run(mut self) -> Result<Report> {
        self.options.begun.get_or_insert_with(Instant::now);
        let conversion = self.request.open_watched(&self.registry, self.monitor, &self.options.cancel)?;
        conversion.plan()?.run(&self.options, self.monitor)
    }
}

/// Runs the example of the README with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
