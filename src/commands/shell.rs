//! `imgtool completions` and `imgtool man`: made from the definitions of the command line.

use std::io::Write as _;
use std::{fs, io};

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use imgtool_toolkit::{Error, Result, ResultExt};

use super::options;
use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::exit::Exit;
use crate::report;

mod completions;

/// Prints completions for a shell.
///
/// # Errors
/// When they can't be printed.
pub fn completions(args: &CompletionsArgs) -> Result<Exit> {
    report::print(&completions::script(args.shell))?;
    Ok(Exit::Done)
}

/// Prints the manual page, or writes it and those of all verbs into a directory.
///
/// # Errors
/// When they can't be written.
pub fn man(args: &ManArgs) -> Result<Exit> {
    let mut command = in_full(Cli::command().disable_help_flag(true));
    // The pages of verbs are called by the whole name: imgtool-convert.1.
    command.build();
    match &args.directory {
        None => report::print_bytes(&page(&command).map_err(failed)?)?,
        Some(directory) => {
            fs::create_dir_all(directory).map_err(failed).in_file(directory)?;
            for (name, text) in pages(&command).map_err(failed)? {
                let path = directory.join(format!("{name}.1"));
                fs::write(&path, text).map_err(failed).in_file(&path)?;
            }
        }
    }
    Ok(Exit::Done)
}

/// A manual leaves nothing out, as the short help does.
fn in_full(command: Command) -> Command {
    command.mut_args(|arg| arg.hide_short_help(false)).mut_subcommands(in_full)
}

/// The pages of a command and of all below it, by name.
fn pages(command: &Command) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut all = vec![(page_name(command), page(command)?)];
    for verb in command.get_subcommands() {
        all.extend(pages(verb)?);
    }
    Ok(all)
}

fn page_name(command: &Command) -> String {
    command.get_display_name().unwrap_or(command.get_name()).to_owned()
}

fn page(command: &Command) -> io::Result<Vec<u8>> {
    let name = page_name(command);
    let version = concat!("imgtool ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).title(&name);
    let mut text = Vec::new();
    writeln!(text, ".TH {} 1 \"{}\" \"{version}\" \"imgtool\"", name.to_uppercase(), date())?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    let closing = command.get_after_long_help().or(command.get_after_help());
    sections(&mut text, &closing.map(ToString::to_string).unwrap_or_default())?;
    if name != "imgtool" {
        writeln!(text, ".SH SEE ALSO\n.BR imgtool (1)")?;
    }
    Ok(without_idle_breaks(&text))
}

/// The day of SOURCE_DATE_EPOCH, which packagers set; else none: pages of one version are the same
/// whenever they are made.
fn date() -> String {
    let seconds = options::source_date_epoch().ok().flatten();
    let time = seconds.and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    time.map_or_else(String::new, |time| time.date_naive().to_string())
}

/// A line break beside a blank line does nothing, and formatters warn of it; so they do of a blank line
/// that is not called one.
fn without_idle_breaks(page: &[u8]) -> Vec<u8> {
    let mut lines: Vec<&[u8]> = page.split(|byte| *byte == b'\n').collect();
    for index in 1..lines.len() {
        if lines[index].is_empty() && lines[index - 1] == b".br" {
            lines[index] = b".sp";
        }
    }
    let is_blank =
        |index: Option<usize>| index.and_then(|i| lines.get(i)).is_some_and(|line| *line == b".sp");
    let idle = |index: usize| {
        lines[index] == b".br" && (is_blank(index.checked_sub(1)) || is_blank(index.checked_add(1)))
    };
    let kept: Vec<&[u8]> = (0..lines.len()).filter(|index| !idle(*index)).map(|index| lines[index]).collect();
    kept.join(&b'\n')
}

/// What stands below the flags in the help: `Title:` with lines further in becomes a section that is
/// printed as it is, other paragraphs become the section before.
fn sections(text: &mut Vec<u8>, closing: &str) -> io::Result<()> {
    let mut has_notes = false;
    for paragraph in closing.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
        let (first, rest) = paragraph.split_once('\n').unwrap_or((paragraph, ""));
        match first.strip_suffix(':').filter(|_| rest.starts_with("  ")) {
            Some(title) => {
                let title =
                    if title == "Exit codes" { "EXIT STATUS".to_owned() } else { title.to_uppercase() };
                writeln!(text, ".SH \"{title}\"\n.nf")?;
                for line in rest.lines() {
                    writeln!(text, "{}", roff(line.strip_prefix("  ").unwrap_or(line)))?;
                }
                writeln!(text, ".fi")?;
            }
            None => {
                writeln!(text, "{}", if has_notes { ".PP" } else { ".SH NOTES" })?;
                has_notes = true;
                for line in paragraph.lines() {
                    writeln!(text, "{}", roff(line))?;
                }
            }
        }
    }
    Ok(())
}

/// A line of text for roff: its control characters escaped.
fn roff(line: &str) -> String {
    let text = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    if text.starts_with('.') { format!("\\&{text}") } else { text }
}

fn failed(e: io::Error) -> Error {
    Error::io("write", e)
}
