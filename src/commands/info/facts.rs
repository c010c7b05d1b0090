//! Facts of an image as text: dates as dates, sizes as sizes, snapshots as a table.

use std::fmt::Write as _;

use chrono::{DateTime, Local};
use imgtool_core::Fact;
use imgtool_core::error::escape_control;
use serde_json::Value;

use crate::report::{self, Align, Stream, exact_size, human_size};

/// Facts in bytes.
const SIZES: [&str; 7] = [
    "block-size",
    "block-extra",
    "cluster-size",
    "granularity",
    "header-size",
    "logical-sector-size",
    "physical-sector-size",
];

/// Seconds from 1970 to 2000, from which VHD counts.
const YEAR_2000: i64 = 946_684_800;

/// Writes facts, each on a line with its label.
pub(super) fn facts<'a>(text: &mut String, indent: usize, facts: impl Iterator<Item = &'a Fact>) {
    for fact in facts {
        match (fact.key, &fact.text) {
            (_, Some(words)) => value(text, indent, fact.label, &Value::from(&**words)),
            ("snapshots", None) => snapshots(text, indent, &fact.value),
            // The driver shows the same time as a date.
            ("ctime", None) => {}
            ("timestamp", None) => {
                let date = fact.value.as_i64().map(|seconds| date(seconds.saturating_add(YEAR_2000)));
                value(text, indent, "created", &date.map_or_else(|| fact.value.clone(), Value::from));
            }
            (key, None) => value(text, indent, fact.label, &shown(key, &fact.value)),
        }
    }
}

/// Returns a number of bytes as a size, and everything else as it is.
fn shown(key: &str, value: &Value) -> Value {
    match value.as_u64().filter(|_| SIZES.contains(&key)) {
        Some(bytes) if bytes < 1000 => format!("{bytes} bytes").into(),
        Some(bytes) => exact_size(bytes).into(),
        None => value.clone(),
    }
}

/// Formats seconds since 1970 as local time.
fn date(seconds: i64) -> String {
    match DateTime::from_timestamp(seconds, 0) {
        Some(time) => time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S %z").to_string(),
        None => format!("{seconds} seconds since 1970"),
    }
}

/// Writes the table of the internal snapshots, with the columns of `qemu-img snapshot -l`.
fn snapshots(text: &mut String, indent: usize, list: &Value) {
    let snapshots = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let row = |snapshot: &Value| {
        let word = |key: &str| snapshot.get(key).map(scalar).unwrap_or_default();
        let number = |key: &str| snapshot.get(key).and_then(Value::as_u64).unwrap_or(0);
        let clock = number("vm-clock-sec");
        vec![
            word("id"),
            word("name"),
            human_size(number("vm-state-size")),
            date(i64::try_from(number("date-sec")).unwrap_or(i64::MAX)),
            format!(
                "{:02}:{:02}:{:02}.{:03}",
                clock / 3600,
                clock / 60 % 60,
                clock % 60,
                number("vm-clock-nsec") / 1_000_000
            ),
        ]
    };
    let columns = [
        ("id", Align::Left),
        ("name", Align::Left),
        ("state", Align::Right),
        ("date", Align::Left),
        ("clock", Align::Right),
    ];
    let rows: Vec<Vec<String>> = snapshots.iter().map(row).collect();
    let _ = writeln!(text, "{:indent$}snapshots:", "");
    text.push_str(&report::table(indent + 4, &columns, &rows));
}

/// Writes one fact. Objects and lists of objects are indented below its label.
fn value(text: &mut String, indent: usize, label: &str, fact: &Value) {
    let pad = " ".repeat(indent);
    let label = escape_control(label);
    match fact {
        Value::Array(items) if items.iter().any(Value::is_object) => {
            let _ = writeln!(text, "{pad}{label}:");
            text.push_str(&objects(indent + 4, items));
        }
        Value::Object(map) => {
            let _ = writeln!(text, "{pad}{label}:");
            for (key, inner) in map {
                value(text, indent + 4, key, inner);
            }
        }
        plain => {
            let line = format!("{pad}{label}: {}", escape_control(&scalar(plain)));
            let _ = writeln!(text, "{}", report::flow(Stream::Out, &line, indent + 4));
        }
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(flag) => if *flag { "yes" } else { "no" }.to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Formats a list of objects as a table, with the keys of the objects as the header.
fn objects(indent: usize, items: &[Value]) -> String {
    let keys: Vec<&String> = items.iter().filter_map(Value::as_object).flat_map(|map| map.keys()).fold(
        Vec::new(),
        |mut keys, key| {
            if !keys.contains(&key) {
                keys.push(key);
            }
            keys
        },
    );
    let columns: Vec<(&str, Align)> = keys.iter().map(|key| (key.as_str(), Align::Left)).collect();
    let cell = |item: &Value, key: &str| item.get(key).map(|value| scalar(&shown(key, value)));
    let rows: Vec<Vec<String>> = items
        .iter()
        .map(|item| keys.iter().map(|key| cell(item, key).unwrap_or_default()).collect())
        .collect();
    report::table(indent, &columns, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgtool_core::ImageInfo;

    #[test]
    fn dates_sizes_and_snapshots_are_words() {
        let mut info = ImageInfo::default();
        info.fact("timestamp", "created, seconds since 2000", 0);
        info.fact("ctime", "created, seconds since 1970", 0);
        info.fact("block-size", "block size", 2 << 20);
        let snapshot = serde_json::json!({
            "id": "1", "name": "clean", "vm-state-size": 3 << 20, "date-sec": 1_790_000_000u64, "date-nsec": 0,
            "vm-clock-sec": 3723, "vm-clock-nsec": 45_000_000
        });
        info.top_fact("snapshots", "snapshots", vec![snapshot]);
        let mut text = String::new();
        facts(&mut text, 0, info.facts.iter());
        assert!(text.contains("created: 2000-01-01") || text.contains("created: 1999-12-31"), "{text}");
        assert!(text.contains("block size: 2 MiB (2097152 bytes)\nsnapshots:\n"), "{text}");
        assert!(text.contains("clean") && text.contains("3 MiB") && text.contains("2026-09-2"), "{text}");
        assert!(text.contains("01:02:03.045") && !text.contains("seconds since"), "{text}");
    }
}
