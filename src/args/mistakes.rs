//! Usage errors: converts clap's errors into the form and wording of all other errors.

use std::borrow::Cow;
use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};
use imgtool_core::{Error, Url, suggest};

use super::Cli;
use crate::compat;

/// Commands of the vma program that are not commands of imgtool itself.
const VMA_COMMANDS: [&str; 4] = ["list", "config", "extract", "verify"];

/// Converts a parser error into one sentence and a hint.
pub fn explain(mistake: &clap::Error, args: &[OsString]) -> Error {
    let text = |kind| mistake.get(kind).map(plain).unwrap_or_default();
    let command = command_of(args);
    let see = format!("see '{} --help'", path_of(args));
    let arg = bare(&text(ContextKind::InvalidArg));
    if let Some(error) = missing_dash(&command, args) {
        return error;
    }
    // Who states a passphrase where its place belongs must not find it in a log.
    let is_secret = ["secret", "header"].iter().any(|name| arg.contains(name))
        && mistake.kind() == ErrorKind::ValueValidation;
    let value = if is_secret { "<secret>".to_owned() } else { text(ContextKind::InvalidValue) };
    match mistake.kind() {
        ErrorKind::InvalidSubcommand => {
            unknown_command(&text(ContextKind::InvalidSubcommand), &command, args)
        }
        ErrorKind::MissingSubcommand => Error::usage("missing command").hint(command_list(&command)),
        ErrorKind::UnknownArgument => unknown_argument(&arg, &command, args).hint(see),
        ErrorKind::InvalidValue if value.is_empty() => Error::usage(format!("{arg} needs a value")).hint(see),
        ErrorKind::InvalidValue => {
            let valid = mistake.get(ContextKind::ValidValue).map(list).unwrap_or_default();
            Error::usage(format!("invalid value '{value}' for {arg}")).hint(suggest::hint(
                &value,
                "values",
                valid.iter().map(String::as_str),
            ))
        }
        ErrorKind::ValueValidation => {
            let reason = std::error::Error::source(mistake).map(|e| e.to_string()).unwrap_or_default();
            Error::usage(format!("invalid value '{value}' for {arg}: {reason}")).hint(see)
        }
        ErrorKind::MissingRequiredArgument if arg.starts_with("--no-create") => {
            Error::usage("--target-is-zero requires -n")
                .hint("only an existing target can be known to read as zeros")
        }
        ErrorKind::MissingRequiredArgument => {
            Error::usage(format!("missing {}", arg.trim_end_matches('.'))).hint(usage(&command, &see))
        }
        ErrorKind::ArgumentConflict => {
            let prior = bare(&text(ContextKind::PriorArg));
            let what = if prior.is_empty() || prior == arg {
                format!("{arg} is given twice")
            } else {
                format!("{arg} conflicts with {prior}")
            };
            Error::usage(what).hint(see)
        }
        ErrorKind::NoEquals => Error::usage(format!("expected {arg}=VALUE")).hint(see),
        ErrorKind::TooManyValues => Error::usage(format!("{arg} takes no value")).hint(see),
        ErrorKind::InvalidUtf8 => Error::usage("argument is not valid UTF-8").hint(see),
        _ => Error::usage(first_line(&mistake.to_string())).hint(see),
    }
}

/// Returns the error for an unknown word where a command is expected.
fn unknown_command(word: &str, command: &Command, args: &[OsString]) -> Error {
    let word = &*without_credentials(word);
    // A path is not a misspelt command.
    if word.contains(['.', '/']) || Path::new(word).exists() {
        return Error::usage(format!("expected a command, not '{word}'"))
            .hint(format!("'imgtool info {word}' describes it, 'imgtool convert {word} DEST' converts it"));
    }
    let error = Error::usage(format!("unknown command '{word}'"));
    if VMA_COMMANDS.contains(&word) && path_of(args) == "imgtool" {
        return error
            .hint(format!("'imgtool vma {word}' does what 'vma {word}' does; {}", command_list(command)));
    }
    if word == "version" {
        return error.hint("'imgtool --version' prints the version");
    }
    if compat::MISSING_COMMANDS.contains(&word) {
        return error.hint(format!("that is left to 'qemu-img {word}'; {}", command_list(command)));
    }
    error.hint(suggest::hint(word, "commands", command.get_subcommands().map(Command::get_name)))
}

/// Returns an argument for a message: a URL without the parts that may grant access.
fn without_credentials(arg: &str) -> Cow<'_, str> {
    Url::parse(arg).map_or(Cow::Borrowed(arg), |url| Cow::Owned(url.to_string()))
}

fn command_list(command: &Command) -> String {
    let names: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
    format!("commands: {}", names.join(", "))
}

/// Returns the error for a surplus argument, an unknown flag or a flag before the command.
fn unknown_argument(arg: &str, command: &Command, args: &[OsString]) -> Error {
    if !arg.starts_with('-') {
        return Error::usage(format!("unexpected argument '{}'", without_credentials(arg)));
    }
    if let Some(name) = command_after_flags(command, args) {
        return Error::usage(format!("flag {arg} before the command"))
            .hint(format!("flags follow the command: imgtool {name} {arg} …"));
    }
    let error = Error::usage(format!("{} has no flag {arg}", path_of(args)));
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

/// Returns the command that follows misplaced flags, if there is one.
fn command_after_flags<'a>(command: &'a Command, args: &[OsString]) -> Option<&'a str> {
    let commands = args.iter().skip(1).filter_map(|arg| command.find_subcommand(arg.to_str()?));
    commands.map(Command::get_name).next()
}

/// Returns an error if a long flag has a single dash: the parser reads it as short flags (`-to` as `-t o`).
fn missing_dash(command: &Command, args: &[OsString]) -> Option<Error> {
    let is_long = |name: &str| command.get_arguments().any(|arg| arg.get_long() == Some(name));
    let slip = args.iter().skip(1).filter_map(|arg| arg.to_str()).find(|arg| {
        arg.strip_prefix('-').is_some_and(|name| name.len() > 1 && !name.starts_with('-') && is_long(name))
    })?;
    Some(
        Error::usage(format!("{} has no flag {slip}", path_of(args)))
            .hint(format!("did you mean '-{slip}'?")),
    )
}

/// Returns the usage of a command if it fits on one line, else `otherwise`.
fn usage(command: &Command, otherwise: &str) -> String {
    let text = command.clone().render_usage().to_string();
    let line = text.strip_prefix("Usage: ").unwrap_or_default().replace(['<', '>'], "");
    if line.is_empty() || line.contains('\n') { otherwise.to_owned() } else { line }
}

/// Strips the value from a flag and the brackets from an argument.
fn bare(arg: &str) -> String {
    match arg.split_once([' ', '=', '[']) {
        Some((flag, _)) if flag.starts_with('-') => flag.to_owned(),
        _ => arg.replace(['<', '>'], ""),
    }
}

/// Returns the innermost command of a command line and its full name ("imgtool vma extract").
fn path(args: &[OsString]) -> (Command, String) {
    let mut command = Cli::command();
    command.build();
    let mut name = compat::program().to_owned();
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

/// Returns a value of clap's error context as text.
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
