//! `imgtool convert`: converts images, unpacks archives into disks and packs disks into archives. This module
//! turns the arguments into a request for the engine, and adds notes for Proxmox.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Instant;

use imgtool_core::{Error, Location, Result};
use imgtool_engine::{
    BrokenBitmaps, DiskTarget, Inspector, Note, OpenSettings, Phase, Request, RunOptions, SourceRequest,
};

use super::options;
use crate::args::{ConvertArgs, InputArgs, ProgressMode, compatibility_help};
use crate::compat::parse_size;
use crate::exit::Exit;
use crate::image_name::JSON;
use crate::interrupt::Interrupt;
use crate::progress::Display;
use crate::sandbox::{self, Writes};
use crate::secrets::SecretSource;
use crate::{compat, images, proxmox, report};

mod configurations;
mod disk_target;
mod domain;
mod new_size;
mod platform;
mod summary;
mod target_name;

/// Converts the sources and prints a summary.
///
/// # Errors
/// If the conversion fails. No output has its final name then.
pub fn run(args: &ConvertArgs) -> Result<Exit> {
    if args.help_compat {
        report::print(&compatibility_help())?;
        return Ok(Exit::Done);
    }
    let begun = Instant::now();
    let registry = images::registry(&args.input)?;
    if options::asks_for_help(&args.target.options) {
        let name = args.target.to.as_deref().unwrap_or("raw");
        return options::list(&*registry.get(name)?);
    }
    // Checked before the paths: 'convert a.raw -O b.qcow2' lacks a format, not a destination.
    args.target.to.iter().try_for_each(|name| registry.get(name).map(drop))?;
    proxmox::check(&args.devices.proxmox)?;
    let (mut request, size_is_given) = request(args)?;
    let target =
        args.target.platform.map(|name| platform::choose(args, &registry, name, &mut request)).transpose()?;
    let bytes_per_second = rate_limit(args)?;

    sandbox::enter(writes(&request));
    let interrupt = Interrupt::listen()?;
    let cancel = interrupt.token();
    let stdout_is_data = targets_of(&request).any(|target| *target == Location::Stdout);
    // Verification opens the outputs again.
    let last_secret = if args.target.verify { Phase::Verify } else { Phase::Convert };
    let display = Display::new(progress(args, stdout_is_data), &interrupt).forgetting_secrets_at(last_secret);
    let pairs = &request.options.pairs;
    let mut conversion = request
        .open_watched(&registry, &display, &cancel)
        .map_err(|e| options::explain_backing(e, &registry, request.dest.as_ref(), pairs))?;
    if !args.messages.quiet && !compat::is_on() {
        conversion.sources().iter().for_each(|source| summary::announce(&source.opened));
        target.iter().for_each(|target| report::tell(&target.in_words()));
    }
    options::check_secret(conversion.format(), args.target.target_secret.is_some())?;
    conversion.select()?;
    let notes = configurations::add(args, &mut conversion)?;
    let mut plan = conversion.plan()?;
    plan.layout.notes.extend(notes.into_iter().map(Note::Text));
    configurations::note_on_restoring(args, &mut plan)?;
    domain::add(&mut plan)?;
    args.target.size.map_or(Ok(()), |size| new_size::set(&mut plan, size, &cancel))?;
    target.map_or(Ok(()), |target| target.shape(args, &mut plan, &cancel))?;
    let is_compressed = plan.sources.iter().any(|source| !source.opened.compression.is_empty());
    plan.layout.notes.extend(size_is_given.then(without_size));
    let options = RunOptions {
        begun: Some(begun),
        threads: args.threads.count(),
        force: args.target.force,
        force_share: args.input.force_share,
        accept_larger: compat::is_on(),
        verify: args.target.verify,
        bytes_per_second,
        inspector: target.as_ref().map(|target| target as &dyn Inspector),
        base_policy: request.open.policy.clone(),
        base_secrets: request.open.secrets.clone(),
        cancel,
        ..RunOptions::default()
    };
    let report = plan.run(&options, &display)?;
    Ok(summary::print(args, &report, stdout_is_data, is_compressed))
}

/// Returns where the outputs go.
fn targets_of(request: &Request) -> impl Iterator<Item = &Location> {
    request.dest.iter().chain(request.disk_targets.iter().map(|target| &target.location))
}

/// Returns the permission to write to the targets and, since an image that exists may have its data file elsewhere,
/// to the files that images may open.
fn writes(request: &Request) -> Writes {
    let allowed = request.in_place.map_or(&[][..], |_| request.open.policy.paths.as_slice());
    let allowed: Vec<Location> = allowed.iter().map(Location::from).collect();
    Writes::to(targets_of(request).chain(&allowed), &request.options.pairs)
}

/// Returns the form of the progress: none if it would be among the data on standard output.
fn progress(args: &ConvertArgs, stdout_is_data: bool) -> ProgressMode {
    match args.messages.mode() {
        ProgressMode::Percent if stdout_is_data => ProgressMode::None,
        mode => mode,
    }
}

/// Returns the note on a size that has no effect.
fn without_size() -> Note {
    Note::Text("-o size has no effect: a converted image has the size of its source".to_owned())
}

/// Converts the arguments into a request. Returns it, and true if the options contain a size, which has no effect
/// in qemu-img either.
fn request(args: &ConvertArgs) -> Result<(Request, bool)> {
    let disk_targets: Vec<DiskTarget> =
        args.devices.target.iter().map(|text| disk_target::parse(text)).collect::<Result<_>>()?;
    let bare_compress = args.target.compress.as_deref() == Some("");
    let (sources, dest) = split_paths(&args.paths, &disk_targets, bare_compress)?;
    images::refuse(&args.input)?;
    if compat::is_on() && dest.is_some_and(|dest| Path::new(dest).is_dir()) {
        return Err(Error::refused("is a directory").path(Path::new(dest.unwrap_or_default())));
    }
    let dest = dest.map(|dest| target_name::parse(args, dest)).transpose()?;
    let mut format_options =
        options::format_options(&args.target.options, args.target.sparse_size.as_deref())?;
    let (backing, backing_format) = (args.target.backing.as_deref(), args.target.backing_format.as_deref());
    options::set_backing(&mut format_options, backing, backing_format);
    let size_is_given = options::take_size(&mut format_options)?.is_some();
    let open = images::open_settings(&args.input)?;
    let key = options::take_key_secret(&mut format_options, &args.input.object)?;
    let target_secret = args.target.target_secret.as_ref().map(SecretSource::read).transpose()?;
    // Of several, none is meant more than the others.
    format_options.secret = target_secret.or(key).or_else(|| open.secrets.single().cloned());
    let zeroed = args.target.target_is_zero || dest.as_ref().is_some_and(|dest| dest.zeroed);
    let stated = args.target.to.as_deref().or(dest.as_ref().and_then(|dest| dest.format.as_deref()));
    if compat::makes_images_for_machines(stated) && args.target.compress.is_none() {
        options::set_default(&mut format_options, "subformat", "monolithicSparse");
    }
    let request = Request {
        sources: sources.iter().map(|text| source(&args.input, text)).collect::<Result<_>>()?,
        source_format: args.input.format.clone(),
        open: OpenSettings {
            salvage: args.work.salvage,
            force: args.target.force,
            snapshot: args.snapshot.snapshot.clone(),
            ..open
        },
        // qemu-img joins several sources without a word.
        join: args.devices.join || compat::is_on() && sources.len() > 1,
        disks: args.devices.disk.clone(),
        format: stated.or(compat::default_format()).map(str::to_owned),
        dest: dest.map(|dest| dest.location),
        disk_targets,
        options: format_options,
        compress: args.target.compress.as_deref().map(options::compress).transpose()?,
        attachments: Vec::new(),
        wants_attachments: !args.devices.config.is_empty() || !args.devices.proxmox.is_empty(),
        keep_attachments: args.devices.config_from_source,
        leave_out_platform_state: args.target.platform.is_some_and(|platform| !platform.rules.takes_state),
        in_place: args.target.no_create.then_some(zeroed),
        overwrite: args.target.force || compat::is_on(),
        bitmaps: args.target.bitmaps.then_some(match args.target.skip_broken_bitmaps {
            true => BrokenBitmaps::Skip,
            false => BrokenBitmaps::Refuse,
        }),
    };
    Ok((request, size_is_given))
}

/// Parses a source: a path, options, JSON, or `NAME=` before a path or JSON.
fn source(args: &InputArgs, text: &OsStr) -> Result<SourceRequest> {
    let is_json = text.to_str().is_some_and(|text| text.starts_with(JSON));
    let name = SourceRequest::parse(text).name.filter(|_| !args.image_opts && !is_json);
    let named = text.to_str().and_then(|text| text.split_once('=')).filter(|_| name.is_some());
    let source = images::source(args, named.map_or(text, |(_, path)| OsStr::new(path)))?;
    Ok(SourceRequest { name, ..source })
}

/// Algorithm names that users write after `-c` by mistake; its value needs a `=` (`-c=zstd`).
const COMPRESSIONS: [&str; 5] = ["zstd", "zst", "gzip", "gz", "zlib"];

/// Splits the paths into the sources and DEST, if there is one. The last path is a source if it names a disk
/// with a target of its own.
fn split_paths<'a>(
    paths: &'a [OsString],
    disk_targets: &[DiskTarget],
    has_bare_compress: bool,
) -> Result<(&'a [OsString], Option<&'a OsStr>)> {
    match paths {
        [] => Err(Error::usage("missing SOURCE").hint("imgtool convert SOURCE... DEST")),
        [_] if !disk_targets.is_empty() => Ok((paths, None)),
        [.., last] if names_a_target(last, disk_targets) => Ok((paths, None)),
        [_] => Err(Error::usage("missing DEST")
            .hint("imgtool convert SOURCE... DEST; 'imgtool convert --help' has examples")),
        [.., dest] if has_bare_compress && COMPRESSIONS.iter().any(|name| dest == name) => {
            let name = dest.display();
            Err(Error::usage(format!("'{name}' would be the name of the output"))
                .hint(format!("-c={name} is the compression; ./{name} is a file of that name")))
        }
        [sources @ .., dest] => Ok((sources, Some(dest))),
    }
}

/// True if a path is `NAME=PATH` with the name of a disk that has a target of its own: a source, not DEST.
fn names_a_target(path: &OsStr, disk_targets: &[DiskTarget]) -> bool {
    let name = SourceRequest::parse(path).name;
    name.is_some_and(|name| disk_targets.iter().any(|target| target.name == name))
}

fn rate_limit(args: &ConvertArgs) -> Result<Option<u64>> {
    let Some(text) = &args.work.rate_limit else { return Ok(None) };
    // 0 is no limit, as in qemu-img.
    parse_size(text).map(|rate| (rate > 0).then_some(rate)).ok_or_else(|| {
        Error::usage(format!("invalid value '{text}' for -r: expected bytes per second, such as 50M"))
    })
}
