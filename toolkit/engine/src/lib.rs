//! The engine of imgtool: turns a request into a plan, runs the plan and reports the result.
//!
//! ```text
//! Request ──open──▶ OpenConversion ──plan──▶ Plan ──run──▶ Report
//! ```
//!
//! * [`Request`] is everything that a user can request of a conversion.
//! * [`request::OpenConversion`] holds the open sources and the selected disks.
//! * [`Plan`] lists every output with its format and destination.
//! * [`Plan::run`] checks and fills them in one copy loop ([`pipeline`]), and names them together.
//! * [`Report`] lists the outputs, the lost ranges, and notes for the user.
//!
//! [`compare`], [`checksum`] and [`create`] use the same pipeline. The engine prints nothing and does not
//! depend on the command line: a [`Monitor`] receives the progress, and errors contain typed remedies.

pub mod allocation;
mod bitmaps;
mod blank;
pub mod checksum;
pub mod chosen;
pub mod compare;
mod contents;
pub mod create;
pub mod digest;
pub mod existing;
pub mod externals;
mod filtered;
pub mod format;
pub mod inspect;
mod join;
pub mod layout;
pub mod measure;
mod missing;
pub mod monitor;
pub mod names;
pub mod open;
mod pace;
pub mod pipeline;
mod rate_limit;
pub mod report;
pub mod request;
mod resized;
pub mod run;
mod sinks;
pub mod size;
pub mod sources;
mod space;
mod spool;
mod survey;
mod tail;
mod verify;
pub mod work;

pub use chosen::{ChosenChain, ChosenImage};
pub use externals::{ExternalPolicy, PolicyOpener};
pub use format::{FormatOptions, TargetFormat};
pub use inspect::{FinishedOutput, Inspector};
pub use layout::{Destination, DiskTarget, Layout, PlannedFile, PlannedOutput};
pub use monitor::{Monitor, Phase, Reach};
pub use open::{Opened, open};
pub use pace::{Pace, Quality, TimeLeft};
pub use report::{DiskReport, FileReport, Note, OutputReport, Report};
pub use request::{BrokenBitmaps, OpenConversion, OpenSettings, Request};
pub use run::{Plan, RunOptions};
pub use sinks::SIZE_TOLERANCE;
pub use sources::{OpenSource, SelectedDisk, SourceRequest};
pub use work::{Gauge, LaneInfo, Work, WorkUnit};

/// Compiles the example of the README with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
