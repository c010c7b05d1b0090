//! What is wrong with a command line, in the words and the form of all other errors.

use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};
use imgtool_toolkit::{Error, suggest};

use super::Cli;

/// Verbs of qemu-img that change images: imgtool only makes new ones.
const CHANGES_IMAGES: [&str; 8] =
    ["amend", "bench", "bitmap", "commit", "dd", "rebase", "resize", "snapshot"];

/// Verbs of the vma program, which stand behind `vma` here.
const OF_VMA: [&str; 4] = ["list", "config", "extract", "verify"];

/// A mistake as an error: one sentence, and what to do about it.
pub fn explain(mistake: &clap::Error, args: &[OsString]) -> Error {
    let text = |kind| mistake.get(kind).map(plain).unwrap_or_default();
    let command = command_of(args);
    let see = format!("'{} --help' lists what there is", path_of(args));
    let arg = bare(&text(ContextKind::InvalidArg));
    if let Some(meant) = one_dash_too_few(&command, args) {
        return meant;
    }
    let value = text(ContextKind::InvalidValue);
    match mistake.kind() {
        ErrorKind::InvalidSubcommand => verb(&text(ContextKind::InvalidSubcommand), &command, args),
        ErrorKind::MissingSubcommand => Error::usage("a verb is missing").hint(verbs(&command)),
        ErrorKind::UnknownArgument => unknown(&arg, &command, args).hint(see),
        ErrorKind::InvalidValue if value.is_empty() => Error::usage(format!("{arg} needs a value")).hint(see),
        ErrorKind::InvalidValue => {
            let valid = mistake.get(ContextKind::ValidValue).map(list).unwrap_or_default();
            Error::usage(format!("{arg} can't be '{value}'")).hint(suggest::hint(
                &value,
                "values",
                valid.iter().map(String::as_str),
            ))
        }
        ErrorKind::ValueValidation => {
            let reason = std::error::Error::source(mistake).map(|e| e.to_string()).unwrap_or_default();
            Error::usage(format!("{arg} can't be '{value}': {reason}")).hint(see)
        }
        ErrorKind::MissingRequiredArgument if arg.starts_with("--no-create") => {
            Error::usage("--target-is-zero needs -n").hint("only what exists already can be known to be zero")
        }
        ErrorKind::MissingRequiredArgument => {
            Error::usage(format!("{arg} is missing")).hint(usage(&command, &see))
        }
        ErrorKind::ArgumentConflict => {
            let prior = bare(&text(ContextKind::PriorArg));
            let what = if prior.is_empty() || prior == arg {
                format!("{arg} is given twice")
            } else {
                format!("{arg} and {prior} exclude each other")
            };
            Error::usage(what).hint(see)
        }
        ErrorKind::NoEquals => Error::usage(format!("{arg} takes its value after '='")).hint(see),
        ErrorKind::TooManyValues => Error::usage(format!("{arg} takes no value")).hint(see),
        ErrorKind::InvalidUtf8 => Error::usage("an argument is not UTF-8").hint(see),
        _ => Error::usage(first_line(&mistake.to_string())).hint(see),
    }
}

fn verb(wanted: &str, command: &Command, args: &[OsString]) -> Error {
    // Only a word that is no image and no flag can be a slip of a verb.
    if wanted.contains(['.', '/']) || Path::new(wanted).exists() {
        return Error::usage(format!("'{wanted}' stands where a verb belongs")).hint(format!(
            "'imgtool info {wanted}' tells what it is, 'imgtool convert {wanted} DEST' converts it"
        ));
    }
    if OF_VMA.contains(&wanted) && path_of(args) == "imgtool" {
        return Error::usage(format!("there is no verb '{wanted}'"))
            .hint(format!("that of the vma program is 'imgtool vma {wanted}'; {}", verbs(command)));
    }
    if wanted == "version" {
        return Error::usage("there is no verb 'version'").hint("'imgtool --version' prints it");
    }
    if CHANGES_IMAGES.contains(&wanted) {
        return Error::usage(format!("there is no '{wanted}': imgtool makes new images and changes none"))
            .hint(format!("qemu-img {wanted} does it; {}", verbs(command)));
    }
    let error = Error::usage(format!("there is no verb '{wanted}'"));
    error.hint(suggest::hint(wanted, "verbs", command.get_subcommands().map(Command::get_name)))
}

fn verbs(command: &Command) -> String {
    let names: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
    format!("verbs: {}", names.join(", "))
}

fn unknown(arg: &str, command: &Command, args: &[OsString]) -> Error {
    if !arg.starts_with('-') {
        return Error::usage(format!("'{arg}' is one argument too many"));
    }
    let error = Error::usage(format!("{} has no flag {arg}", path_of(args)));
    if let Some(verb) = verb_behind(command, args) {
        return error.hint(format!("flags stand behind the verb: imgtool {verb} {arg} …"));
    }
    let flags: Vec<String> =
        command.get_arguments().filter_map(|a| a.get_long()).map(|l| format!("--{l}")).collect();
    let name = arg.split('=').next().unwrap_or(arg);
    match suggest::nearest(name, flags.iter().map(String::as_str)).filter(|_| name.len() > 3) {
        Some(near) => {
            let help = format!("did you mean '{near}'? '{} --help' lists all flags", path_of(args));
            error.hint(help)
        }
        None => error,
    }
}

/// The verb that follows flags which belong behind it.
fn verb_behind<'a>(command: &'a Command, args: &[OsString]) -> Option<&'a str> {
    let verbs = args.iter().skip(1).filter_map(|arg| command.find_subcommand(arg.to_str()?));
    verbs.map(Command::get_name).next()
}

/// `-to qcow2` is `-t o` to a parser.
fn one_dash_too_few(command: &Command, args: &[OsString]) -> Option<Error> {
    let is_long = |name: &str| command.get_arguments().any(|arg| arg.get_long() == Some(name));
    let slip = args.iter().skip(1).filter_map(|arg| arg.to_str()).find(|arg| {
        arg.strip_prefix('-').is_some_and(|name| name.len() > 1 && !name.starts_with('-') && is_long(name))
    })?;
    Some(
        Error::usage(format!("{} has no flag {slip}", path_of(args)))
            .hint(format!("did you mean '-{slip}'?")),
    )
}

/// How a verb is called, on one line.
fn usage(command: &Command, otherwise: &str) -> String {
    let text = command.clone().render_usage().to_string();
    let line = text.strip_prefix("Usage: ").unwrap_or_default().replace(['<', '>'], "");
    if line.is_empty() || line.contains('\n') { otherwise.to_owned() } else { line }
}

/// A flag without its value, an argument without brackets.
fn bare(arg: &str) -> String {
    match arg.split_once([' ', '=', '[']) {
        Some((flag, _)) if flag.starts_with('-') => flag.to_owned(),
        _ => arg.replace(['<', '>'], ""),
    }
}

/// The verb of a command line, as deep as it goes ("vma extract").
fn path(args: &[OsString]) -> (Command, String) {
    let mut command = Cli::command();
    command.build();
    let mut name = command.get_name().to_owned();
    for arg in args.iter().skip(1) {
        let Some(next) = arg.to_str().and_then(|arg| command.find_subcommand(arg)) else { break };
        name = format!("{name} {}", next.get_name());
        command = next.clone();
    }
    (command, name)
}

fn command_of(args: &[OsString]) -> Command {
    path(args).0
}

fn path_of(args: &[OsString]) -> String {
    path(args).1
}

/// A piece of clap's knowledge as text, without the brackets of the usage line.
fn plain(value: &ContextValue) -> String {
    match value {
        ContextValue::String(text) => text.clone(),
        other => list(other).join(", "),
    }
}

fn list(value: &ContextValue) -> Vec<String> {
    match value {
        ContextValue::Strings(texts) => texts.clone(),
        ContextValue::String(text) => vec![text.clone()],
        _ => Vec::new(),
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}
