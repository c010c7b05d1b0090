//! Import rules of virtualization platforms and clouds.
//!
//! A [`Platform`] is a name that a user states, such as `azure` or `hyperv:gen2`. Its [`Rules`] say which
//! forms of an image it takes. They choose the format of a new image ([`Form`]), and judge a finished one
//! ([`Platform::check`]). The content of the disks is looked at ([`Guest`]), but never changed.

mod check;
mod glimpse;
mod guest;
mod partitions;
mod platform;
mod rules;

pub use check::{Finding, Severity, Subject, Verdict};
pub use glimpse::{Glimpse, Sectors};
pub use guest::Guest;
pub use partitions::{Partition, PartitionKind, PartitionTable, Scheme};
pub use platform::{Generation, Platform};
pub use rules::{Choice, FactRule, Form, Purpose, RULES, Rules, SizeRule, Values};
