//! `imgtool completions` and `imgtool man`, generated from the definitions of the command line.

use std::io::Write as _;
use std::{fs, io};

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use imgtool_core::{Error, Result, ResultExt};

use super::options;
use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::exit::Exit;
use crate::report;

mod completions;

/// Prints the completion script of a shell.
pub fn completions(args: &CompletionsArgs) -> Result<Exit> {
    report::print(&completions::script(args.shell))?;
    Ok(Exit::Done)
}

/// Prints the manual page, or writes it and the pages of all commands into a directory.
pub fn man(args: &ManArgs) -> Result<Exit> {
    let mut command = show_all_flags(Cli::command().disable_help_flag(true));
    // Sets the full names of the commands, which become the names of the pages (imgtool-convert.1).
    command.build();
    match &args.directory {
        None => report::print_bytes(&page(&command).map_err(write_error)?)?,
        Some(directory) => {
            fs::create_dir_all(directory).map_err(write_error).in_file(directory)?;
            for (name, text) in pages(&command).map_err(write_error)? {
                let path = directory.join(format!("{name}.1"));
                fs::write(&path, text).map_err(write_error).in_file(&path)?;
            }
        }
    }
    Ok(Exit::Done)
}

/// Shows the flags that the short help hides.
fn show_all_flags(command: Command) -> Command {
    command.mut_args(|arg| arg.hide_short_help(false)).mut_subcommands(show_all_flags)
}

/// Returns the names and manual pages of a command and of all its subcommands.
fn pages(command: &Command) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut all = vec![(page_name(command), page(command)?)];
    for subcommand in command.get_subcommands() {
        all.extend(pages(subcommand)?);
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
    closing_sections(&mut text, &closing.map(ToString::to_string).unwrap_or_default())?;
    if name != "imgtool" {
        writeln!(text, ".SH SEE ALSO\n.BR imgtool (1)")?;
    }
    Ok(without_redundant_breaks(&text))
}

/// Returns the date of SOURCE_DATE_EPOCH, which packagers set. Otherwise the date is empty, so that the pages
/// of a version are reproducible.
fn date() -> String {
    let seconds = options::source_date_epoch().ok().flatten();
    let time = seconds.and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    time.map_or_else(String::new, |time| time.date_naive().to_string())
}

/// Removes redundant line breaks from clap's pages, and replaces blank lines by `.sp`: `mandoc -T lint` warns
/// about both.
fn without_redundant_breaks(page: &[u8]) -> Vec<u8> {
    let mut lines: Vec<&[u8]> = page.split(|byte| *byte == b'\n').collect();
    for index in 1..lines.len() {
        if lines[index].is_empty() && lines[index - 1] == b".br" {
            lines[index] = b".sp";
        }
    }
    let is_blank =
        |index: Option<usize>| index.and_then(|i| lines.get(i)).is_some_and(|line| *line == b".sp");
    let is_redundant = |index: usize| {
        lines[index] == b".br" && (is_blank(index.checked_sub(1)) || is_blank(index.checked_add(1)))
    };
    let kept: Vec<&[u8]> =
        (0..lines.len()).filter(|index| !is_redundant(*index)).map(|index| lines[index]).collect();
    kept.join(&b'\n')
}

/// Writes the text that the help prints below the flags. A paragraph of `Title:` and indented lines becomes
/// a preformatted section; all other paragraphs form the section NOTES.
fn closing_sections(text: &mut Vec<u8>, closing: &str) -> io::Result<()> {
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

/// Escapes the characters that are special in roff.
fn roff(line: &str) -> String {
    let text = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    if text.starts_with('.') { format!("\\&{text}") } else { text }
}

fn write_error(e: io::Error) -> Error {
    Error::io("write", e)
}
