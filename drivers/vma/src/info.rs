//! Facts about an archive, for the `info` command.

use std::ops::Range;

use imgtool_core::error::escape_control;
use imgtool_core::{DeviceId, DeviceKind, ImageInfo, Machine};
use imgtool_machine::proxmox;
use serde_json::json;

use crate::header::ArchiveHeader;
use crate::index::Index;
use crate::layout::CLUSTER;

/// Seconds in a day.
const DAY: i64 = 86_400;

/// Describes an archive from its header and, if there is one, its index.
pub(crate) fn info(header: &ArchiveHeader, index: Option<&Index>) -> ImageInfo {
    let mut info = ImageInfo {
        format: "vma",
        devices: header.devices.clone(),
        attachments: header.configs.clone(),
        machine: machine(header).map(Box::new),
        cluster_size: Some(CLUSTER),
        notes: header.notes.clone(),
        ..ImageInfo::default()
    };
    info.fact("uuid", "UUID", header.uuid.to_string());
    info.fact("creation-time", "created", utc(header.ctime));
    info.fact("ctime", "created, seconds since 1970", header.ctime);
    info.fact("header-size", "header size", header.header_size);
    info.fact("extents", "extents", index.map(|index| index.extents));
    let table = header.devices.iter().map(|device| {
        // The last sub-block is stored in full, so it may reach past the end of the device.
        let stored =
            index.and_then(|index| index.device(device.id)).map(|counts| counts.stored.min(device.size));
        json!({
            "dev-id": device.id.0,
            "name": device.name,
            "stored-bytes": stored,
            "zero-bytes": stored.map(|stored| device.size - stored),
        })
    });
    info.fact("devices", "devices", table.collect::<Vec<_>>());
    if let Some(index) = index {
        add_notes(&mut info, header, index);
    }
    info
}

/// Returns the machine that the guest's configuration describes, if there is one that can be parsed.
fn machine(header: &ArchiveHeader) -> Option<Machine> {
    let config = header.configs.iter().find(|config| config.name == proxmox::CONFIG_NAME)?;
    proxmox::parse(&config.data).ok()
}

/// Returns the note that stored sizes are unknown because only the first `stream_len` bytes of a stream were
/// read.
pub(crate) fn not_counted(stream_len: u64) -> String {
    format!(
        "stored sizes are unknown: the archive is a stream, and only its first {stream_len} bytes were read"
    )
}

/// Returns the note that guest state ends before its size in the header.
pub(crate) fn short_state(header: &ArchiveHeader, device: DeviceId, guest: &Range<u64>) -> String {
    let name = header.device(device).map_or_else(String::new, |device| escape_control(&device.name));
    format!(
        "device {name} ends at {} of {} bytes, and the rest is zeros: the size of a guest's state is an estimate",
        guest.start, guest.end
    )
}

/// Adds notes about clusters and sub-blocks past the end of a device.
fn add_notes(info: &mut ImageInfo, header: &ArchiveHeader, index: &Index) {
    let short = index.short_states.iter();
    info.notes.extend(short.map(|(device, guest)| short_state(header, *device, guest)));
    for device in &header.devices {
        let Some(counts) = index.device(device.id) else { continue };
        let name = escape_control(&device.name);
        if counts.dropped_blocks > 0 {
            info.notes.push(format!(
                "{} sub-blocks of device {name} lie past its end and are left out (usual in archives of 2012 to 2017)",
                counts.dropped_blocks
            ));
        }
        match device.kind {
            _ if counts.beyond == 0 => {}
            DeviceKind::Disk => info.notes.push(format!(
                "{} zero clusters of device {name} lie past its end and are left out",
                counts.beyond
            )),
            DeviceKind::VmState => info.notes.push(format!(
                "{} clusters of the guest state lie past its end and are left out",
                counts.beyond
            )),
        }
    }
}

/// Formats seconds since 1970 as a date and time in UTC, in the proleptic Gregorian calendar.
fn utc(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Returns the year, month and day of a day counted from 1970-01-01. Years are shifted to begin in March, so
/// the leap day is the last day of a year; 400 years have 146,097 days.
fn civil(days: i64) -> (i64, i64, i64) {
    // i64 seconds are about 10^14 days, so nothing below overflows.
    let shifted = days + 719_468; // counted from 0000-03-01
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn formats_dates_across_leap_days_and_extremes() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(315_532_800), "1980-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_341_838), "2026-11-22 10:03:58 UTC");
        assert_eq!(utc(-1), "1969-12-31 23:59:59 UTC");
        // The format allows any ctime.
        let _ = (utc(i64::MIN), utc(i64::MAX));
    }
}
