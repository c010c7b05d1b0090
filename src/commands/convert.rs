//! `imgtool convert`: any image into any other, one archive into many disks, many disks into one
//! archive, in one pass.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use imgtool_toolkit::{
    Attachment, CreateOptions, DeviceKind, Error, OpenOptions, Outputs, Registry, Result, ResultExt,
    parse_size,
};

use super::{extras, options};
use crate::args::ConvertArgs;
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::RateLimit;
use crate::{drivers, images};

pub(super) mod format;
pub(super) mod layout;
pub(super) mod names;
pub(super) mod proxmox;
mod sinks;
pub(super) mod sources;
mod space;
mod summary;
mod verify;
pub(super) mod write;

use format::Format;
use layout::{Layout, OwnPlace, Place, Request};
use sources::{Source, SourceArg, Taken};

/// Converts.
///
/// # Errors
/// Whatever kept it from being done; nothing is left under a final name then.
pub fn run(args: &ConvertArgs) -> Result<Exit> {
    let registry = drivers::registry();
    if options::asks_for_help(&args.target.options) {
        let name = args.target.to.as_deref().unwrap_or("raw");
        return options::list(&*images::driver(&registry, name)?);
    }
    refuse_what_is_not_taken(args)?;
    // 'convert a.raw -O b.qcow2' lacks a format, not a destination.
    args.target.to.iter().try_for_each(|name| images::driver(&registry, name).map(drop))?;
    let own_places =
        args.devices.target.iter().map(|text| OwnPlace::parse(text)).collect::<Result<Vec<_>>>()?;
    let (source_args, dest) = split_paths(&args.paths, !own_places.is_empty())?;
    let create = create_options(args)?;
    let format = format::choose(
        &registry,
        args.target.to.as_deref(),
        dest.as_deref(),
        args.target.compress.as_deref(),
        create,
    )?;
    check_configurations(args, &format)?;
    let limit = rate_limit(args)?;

    let interrupt = Interrupt::listen()?;
    let mut outputs = Outputs::new();
    interrupt.cleans(outputs.cleaner());
    let open_options = open_options(&registry, args)?;
    let source_format = args.input.format.as_deref();
    let cancel = interrupt.token();
    let sources = sources::open(&registry, source_args, source_format, &open_options, &format, &cancel)?;
    for source in &sources {
        outputs.protect(&source.arg.path)?;
        images::named_files(&source.opened).iter().try_for_each(|path| outputs.protect(path))?;
    }
    args.input.allow_external.iter().try_for_each(|path| outputs.protect(path))?;
    open_options.externals.opened().iter().try_for_each(|path| outputs.protect(path))?;
    if !args.messages.quiet {
        sources.iter().for_each(summary::announce);
    }
    let mut taken = sources::take(&registry, &sources, &args.devices.disk)?;
    let renamed =
        if format.is_archive() { sources::name_for_archive(&sources, &mut taken) } else { Vec::new() };
    let attachments = attachments(args, &sources, &mut taken, dest.as_deref())?;
    let request = Request {
        registry: &registry,
        sources: &sources,
        taken: &taken,
        format: &format,
        dest: dest.as_deref(),
        own_places,
        attachments,
        in_place: args.target.no_create.then_some(args.target.target_is_zero),
    };
    let mut layout = request.layout()?;
    layout.notes.extend(renamed);
    note_on_restoring(&mut layout, &taken);
    let work = write::Work {
        registry: &registry,
        base_options: images::open_options(&registry, &args.input)?,
        threads: args.threads.count(),
        force: args.target.force,
        take_busy: args.target.force,
        progress: args.messages.mode(),
        limit,
        verify: args.target.verify,
        observer: None,
    };
    let result = write::write(work, &layout, sources, &taken, outputs, &interrupt)?;
    summary::print(args, &layout, &taken, &result)
}

/// `-o`, `-S`, and `-B` with `-F`, which are two options of qcow2.
fn create_options(args: &ConvertArgs) -> Result<CreateOptions> {
    let mut create = options::create_options(&args.target.options, args.target.sparse_size.as_deref())?;
    extras::add_backing(&mut create, args.target.backing.as_deref(), args.target.backing_format.as_deref())?;
    Ok(create)
}

fn refuse_what_is_not_taken(args: &ConvertArgs) -> Result<()> {
    if args.compat.target_image_opts {
        return Err(Error::usage("--target-image-opts is not taken: targets are named by plain paths")
            .hint("give the path itself, its format with --to, its options with -o"));
    }
    if args.compat.bitmaps || args.compat.skip_broken_bitmaps {
        return Err(Error::usage("--bitmaps is not taken: persistent bitmaps are not written")
            .hint("leave it out: the content is complete without them, and those left out are named"));
    }
    Ok(())
}

/// The sources and DEST, if there is one.
fn split_paths(paths: &[OsString], has_own_places: bool) -> Result<(Vec<SourceArg>, Option<PathBuf>)> {
    let (sources, dest) = match paths {
        [] => return Err(Error::usage("there is no source").hint("imgtool convert SOURCE... DEST")),
        [source] if has_own_places => (std::slice::from_ref(source), None),
        [_] => {
            return Err(Error::usage("there is no destination")
                .hint("imgtool convert SOURCE... DEST; 'imgtool convert --help' has examples"));
        }
        [sources @ .., dest] => (sources, Some(PathBuf::from(dest))),
    };
    Ok((sources.iter().map(|arg| SourceArg::parse(arg)).collect(), dest))
}

fn open_options(registry: &Registry, args: &ConvertArgs) -> Result<OpenOptions> {
    Ok(OpenOptions {
        salvage: args.work.salvage,
        force: args.target.force,
        snapshot: args.snapshot.snapshot.as_deref().map(images::snapshot_name),
        ..images::open_options(registry, &args.input)?
    })
}

fn check_configurations(args: &ConvertArgs, format: &Format) -> Result<()> {
    let asked_for = !args.devices.config.is_empty() || !args.devices.proxmox.is_empty();
    if asked_for && !format.driver.capabilities().attachments {
        return Err(Error::usage(format!("{} images hold no configurations", format.driver.name()))
            .hint("--config and --proxmox are for archives: --to vma"));
    }
    Ok(())
}

/// The configurations that go along: those of `--config` and `--proxmox`, else (or too, if asked)
/// the sources' own.
fn attachments(
    args: &ConvertArgs,
    sources: &[Source],
    taken: &mut [Taken],
    dest: Option<&Path>,
) -> Result<Vec<Attachment>> {
    let mut attachments =
        args.devices.config.iter().map(|path| read_config(path)).collect::<Result<Vec<_>>>()?;
    if !args.devices.proxmox.is_empty() {
        if attachments.iter().any(|known| known.name == proxmox::CONFIG_NAME) {
            return Err(Error::usage(format!("--proxmox and --config both give {}", proxmox::CONFIG_NAME)));
        }
        attachments.push(proxmox::configure(&args.devices.proxmox, taken, dest)?);
    }
    let none_given = attachments.is_empty();
    if none_given || args.devices.config_from_source {
        for attachment in sources.iter().flat_map(Source::attachments) {
            // What was given replaces what the source has under the same name.
            if none_given || !attachments.iter().any(|known| known.name == attachment.name) {
                attachments.push(attachment.clone());
            }
        }
    }
    Ok(attachments)
}

/// Archives that are made to be restored should have a name under which they are, and a configuration
/// that knows their disks.
fn note_on_restoring(layout: &mut Layout, taken: &[Taken]) {
    for target in &layout.targets {
        let config = target.attachments.iter().find(|config| config.name == proxmox::CONFIG_NAME);
        let Some(config) = config else { continue };
        if let Place::New(path) = &target.place {
            let compression = target.format.outer.map(|outer| outer.compression);
            layout.notes.extend(proxmox::note_on_name(path, compression));
        }
        let disks = target.devices.iter().map(|index| &taken[*index]);
        let disks = disks.filter(|taken| taken.device.kind == DeviceKind::Disk).map(|taken| &*taken.name);
        layout.notes.extend(proxmox::notes_on_map(&config.data, &disks.collect::<Vec<_>>()));
    }
}

fn read_config(path: &Path) -> Result<Attachment> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::usage("is not a file name").path(path))?
        .to_string_lossy()
        .into_owned();
    let data = std::fs::read(path).map_err(|e| Error::io("read the configuration", e)).in_file(path)?;
    Ok(Attachment { name, data })
}

fn rate_limit(args: &ConvertArgs) -> Result<Option<RateLimit>> {
    let Some(text) = &args.work.rate_limit else { return Ok(None) };
    let rate = parse_size(text)
        .filter(|rate| *rate > 0)
        .ok_or_else(|| Error::usage(format!("-r takes bytes a second, such as 50M, not '{text}'")))?;
    Ok(Some(RateLimit::new(rate)))
}
