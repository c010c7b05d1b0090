//! `vma list`: prints the content of the header. `extract -r` and `verify -v` print the same lines first, and
//! restore tools parse them.

use std::fmt::Write as _;
use std::path::Path;

use chrono::{DateTime, Datelike, Local};
use imgtool_core::Device;
use imgtool_core::error::escape_control;
use imgtool_vma::ArchiveHeader;

use super::{Failure, header, is_state};
use crate::exit::Exit;
use crate::report;

pub(super) fn run(file: &Path) -> Result<Exit, Failure> {
    report::print(&lines(&header(file)?))?;
    Ok(Exit::Done)
}

/// Returns the lines: configurations in the header's order, devices by ascending id, and the creation time.
pub(super) fn lines(header: &ArchiveHeader) -> String {
    let mut text = String::new();
    for config in &header.configs {
        // A name with a line feed could forge lines.
        let name = escape_control(&config.name);
        let _ = writeln!(text, "CFG: size: {} name: {name}", config.data.len());
    }
    let mut devices: Vec<&Device> = header.devices.iter().collect();
    devices.sort_by_key(|device| device.id);
    for device in devices {
        let _ = if is_state(device.kind) {
            writeln!(text, "VMSTATE: dev_id={} memory: {}", device.id, device.size)
        } else {
            let name = escape_control(&device.name);
            writeln!(text, "DEV: dev_id={} size: {} devname: {name}", device.id, device.size)
        };
    }
    text.push_str(&ctime(header.ctime));
    text
}

/// Formats a time in seconds since 1970 as local time, like asctime(3).
fn ctime(seconds: i64) -> String {
    match DateTime::from_timestamp(seconds, 0) {
        Some(time) => {
            let time = time.with_timezone(&Local);
            // Like asctime, print the year as a plain number, even beyond 9999.
            format!("CTIME: {} {}\n", time.format("%a %b %e %H:%M:%S"), time.year())
        }
        None => "CTIME: (null)".to_owned(),
    }
}
