//! The command lines of the verbs that look at images.

use std::path::PathBuf;

use clap::Args;

use super::{InputArgs, OutputArgs, SnapshotArgs};

/// `imgtool info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Images or archives; '-' is standard input
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,

    /// Show the image's backing files too, as far as --allow-external lets them be opened
    #[arg(long)]
    pub backing_chain: bool,

    #[command(flatten)]
    pub output: OutputArgs,

    #[command(flatten)]
    pub input: InputArgs,

    #[command(flatten)]
    pub snapshot: SnapshotArgs,
}
