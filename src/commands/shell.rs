//! `imgtool completions` and `imgtool man`: made from the definitions of the command line.

use std::{fs, io};

use clap::CommandFactory;
use clap_mangen::Man;
use imgtool_toolkit::{Error, Result, ResultExt};

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::exit::Exit;
use crate::report;

/// Prints completions for a shell.
///
/// # Errors
/// When they can't be printed.
pub fn completions(args: &CompletionsArgs) -> Result<Exit> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "imgtool", &mut text);
    report::print_bytes(&text)?;
    Ok(Exit::Done)
}

/// Prints the manual page, or writes it and those of all verbs into a directory.
///
/// # Errors
/// When they can't be written.
pub fn man(args: &ManArgs) -> Result<Exit> {
    let mut command = Cli::command();
    // The pages of verbs are called by the whole name: imgtool-convert.1.
    command.build();
    match &args.directory {
        None => {
            let mut text = Vec::new();
            Man::new(command).render(&mut text).map_err(failed)?;
            report::print_bytes(&text)?;
        }
        Some(directory) => {
            fs::create_dir_all(directory).map_err(failed).in_file(directory)?;
            clap_mangen::generate_to(command, directory).map_err(failed).in_file(directory)?;
        }
    }
    Ok(Exit::Done)
}

fn failed(e: io::Error) -> Error {
    Error::io("write", e)
}
