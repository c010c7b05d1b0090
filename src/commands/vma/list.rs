//! `vma list`: prints the content of the header. `extract -r` and `verify -v` print the same lines first, and
//! restore tools parse them.

use std::path::Path;

use chrono::{DateTime, Datelike, Local};
use imgtool_core::Device;
use imgtool_vma::ArchiveHeader;

use super::{Failure, header, is_state, output};
use crate::exit::Exit;

pub(super) fn run(file: &Path) -> Result<Exit, Failure> {
    output::print_bytes(&lines(&header(file)?))?;
    Ok(Exit::Done)
}

/// Returns the lines: configurations in the header's order, devices by ascending id, and the creation time.
pub(super) fn lines(header: &ArchiveHeader) -> Vec<u8> {
    let mut text = Vec::new();
    let mut line = |front: String, name: &[u8]| {
        text.extend_from_slice(front.as_bytes());
        // A name with a line feed could forge lines.
        text.extend_from_slice(&output::name(name));
        text.push(b'\n');
    };
    for (index, config) in header.configs.iter().enumerate() {
        line(format!("CFG: size: {} name: ", config.data.len()), header.config_name(index));
    }
    let mut devices: Vec<&Device> = header.devices.iter().collect();
    devices.sort_by_key(|device| device.id);
    for device in devices {
        if is_state(device.kind) {
            line(format!("VMSTATE: dev_id={} memory: {}", device.id, device.size), b"");
        } else {
            let front = format!("DEV: dev_id={} size: {} devname: ", device.id, device.size);
            line(front, header.device_name(device));
        }
    }
    text.extend_from_slice(ctime(header.ctime).as_bytes());
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
