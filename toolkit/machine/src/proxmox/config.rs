//! A guest's configuration as Proxmox VE keeps it (`/etc/pve/qemu-server/VMID.conf`, qm.conf(5)), and as an
//! archive holds it.
//!
//! A backup has the settings of the guest's current state. It has no snapshots and no pending changes (both
//! are sections behind the settings), no lock and no unused volumes. Comments that assign the devices of the
//! archive to drives follow the settings.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::keys;

/// Prefix of the comments that assign a device of the archive to a drive:
/// `#qmdump#map:DRIVE:DEVICE:STORAGE:FORMAT:`.
pub const MAP_LINE: &str = "#qmdump#map:";

/// Prefixes of comments that belong to one backup. A new backup does not repeat them.
const BACKUP_COMMENTS: [&str; 2] = ["#qmdump#", "#vzdump#"];

/// A line of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Line {
    /// `KEY: VALUE`.
    Setting(String, String),
    /// A comment or an empty line, as it is. Leading comments are the guest's description.
    Comment(String),
}

/// Settings and comments of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestConfig {
    lines: Vec<Line>,
    /// Parts of the file that a backup omits, in words.
    pub left_out: Vec<String>,
    /// Settings that Proxmox VE does not know.
    pub unknown: Vec<String>,
    /// Settings with values that Proxmox VE does not take, and what is wrong with them.
    pub wrong: Vec<String>,
    /// The first line that is no setting, with its number.
    pub bad_line: Option<(usize, String)>,
}

impl GuestConfig {
    /// Parses a configuration. Returns `None` for any other text: most of its lines are no settings that
    /// Proxmox VE knows.
    pub fn parse(text: &str) -> Option<Self> {
        let mut config = Self::default();
        let mut snapshots = Vec::new();
        let mut in_section = false;
        let mut bad_lines = 0;
        let mut keys = HashSet::new();
        for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines().map(str::trim_end)) {
            if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                in_section = true;
                match section.to_ascii_lowercase().as_str() {
                    "pending" => config.left_out.push("pending changes".to_owned()),
                    name if name.contains(':') => config.left_out.push(format!("section [{section}]")),
                    _ => snapshots.push(section.to_owned()),
                }
            } else if in_section {
                // Belongs to the section that is left out.
            } else if line.is_empty() || line.starts_with('#') {
                if !BACKUP_COMMENTS.iter().any(|prefix| line.starts_with(prefix)) {
                    config.lines.push(Line::Comment(line.to_owned()));
                }
            } else if config.add_line(line, &mut keys).is_none() {
                bad_lines += 1;
                config.bad_line.get_or_insert_with(|| (number, line.to_owned()));
            }
        }
        // The line that separates the settings from the first section.
        while config.lines.last().is_some_and(|line| matches!(line, Line::Comment(text) if text.is_empty())) {
            config.lines.pop();
        }
        match snapshots.as_slice() {
            [] => {}
            [one] => config.left_out.push(format!("snapshot {one}")),
            several => config.left_out.push(format!("snapshots {}", several.join(", "))),
        }
        let settings = config.lines.iter().filter(|line| matches!(line, Line::Setting(..))).count();
        let known = settings.saturating_sub(config.unknown.len());
        (known > bad_lines + config.unknown.len()).then_some(config)
    }

    /// Adds the setting of a line. Returns `None` if it is none, or its key is among the `keys` of earlier lines.
    fn add_line<'a>(&mut self, line: &'a str, keys: &mut HashSet<&'a str>) -> Option<()> {
        let (key, value) = line.split_once(':')?;
        let is_key_char = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if key.is_empty() || !key.chars().all(is_key_char) || !keys.insert(key) {
            return None;
        }
        if matches!(key, "lock" | "parent") || keys::is_unused(key) {
            self.left_out.push(format!("{key} ({})", value.trim()));
            return Some(());
        }
        if !keys::is_known(key) {
            self.unknown.push(key.to_owned());
        }
        if let Some(what) = keys::wrong_value(key, value.trim()) {
            self.wrong.push(format!("{key} ({what})"));
        }
        self.lines.push(Line::Setting(key.to_owned(), value.trim().to_owned()));
        Some(())
    }

    /// Returns the value of a setting.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.settings().find(|(known, _)| *known == key).map(|(_, value)| value)
    }

    /// Returns all settings in the order of the file.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().filter_map(|line| match line {
            Line::Setting(key, value) => Some((&**key, &**value)),
            Line::Comment(_) => None,
        })
    }

    /// Sets a value. A new setting goes before the first one with a greater name, as Proxmox VE sorts them.
    pub fn set(&mut self, key: &str, value: &str) {
        if key == "description" {
            return self.describe(value);
        }
        let same = |line: &Line| matches!(line, Line::Setting(known, _) if known == key);
        let greater = |line: &Line| matches!(line, Line::Setting(known, _) if known.as_str() > key);
        let line = Line::Setting(key.to_owned(), value.to_owned());
        match self.lines.iter().position(same) {
            Some(index) => self.lines[index] = line,
            None => {
                let end = self.lines.len();
                let index = self.lines.iter().position(greater).unwrap_or(end);
                self.lines.insert(index, line);
            }
        }
    }

    /// Sets a value, unless the setting has one.
    pub fn set_default(&mut self, key: &str, value: &str) {
        if self.get(key).is_none() {
            self.set(key, value);
        }
    }

    /// Removes a setting.
    pub fn remove(&mut self, key: &str) {
        self.lines.retain(|line| !matches!(line, Line::Setting(known, _) if known == key));
    }

    /// Replaces the description, which Proxmox VE stores as comments before the settings.
    fn describe(&mut self, text: &str) {
        let is_comment = |line: &&Line| matches!(line, Line::Comment(_));
        let old = self.lines.iter().take_while(is_comment).count();
        self.lines.splice(0..old, text.split("\\n").map(|line| Line::Comment(format!("#{line}"))));
    }

    /// Returns the comments before the settings: the description.
    pub(super) fn leading_comments(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map_while(|line| match line {
            Line::Comment(text) => Some(text.strip_prefix('#').unwrap_or(text)),
            Line::Setting(..) => None,
        })
    }

    /// Returns the text, with the comments that assign the devices at its end.
    pub fn text(&self, map: &[MapEntry]) -> String {
        let mut text = String::new();
        for line in &self.lines {
            let _ = match line {
                Line::Setting(key, value) => writeln!(text, "{key}: {value}"),
                Line::Comment(comment) => writeln!(text, "{comment}"),
            };
        }
        for MapEntry { drive, device, storage, format } in map {
            let _ = writeln!(text, "{MAP_LINE}{drive}:{device}:{storage}:{format}:");
        }
        text
    }
}

/// Assignment of a device to a drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapEntry {
    /// Drive of the guest (`scsi0`).
    pub drive: String,
    /// Device of the archive (`drive-scsi0`).
    pub device: String,
    /// Storage that held the drive; empty if unknown.
    pub storage: String,
    /// Format of the drive on that storage.
    pub format: String,
}

/// Returns the assignments in a configuration.
pub fn map_entries(text: &str) -> Vec<MapEntry> {
    let entry = |line: &str| {
        let mut fields = line.strip_prefix(MAP_LINE)?.split(':').map(str::to_owned);
        Some(MapEntry {
            drive: fields.next()?,
            device: fields.next()?,
            storage: fields.next()?,
            format: fields.next()?,
        })
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = "#web server\r\nboot: order=scsi0\nlock: backup\nmemory: 2048\nparent: before\n\
        scsi0: local-lvm:vm-100-disk-0,size=32G\nunused0: local-lvm:vm-100-disk-9\n\
        #qmdump#map:scsi0:old:local:raw:\n\n[PENDING]\nmemory: 4096\n\n[before]\nmemory: 1024\nsnaptime: 1\n\
        [special:cloudinit]\nname: x\n";

    #[test]
    fn keeps_the_current_state_alone() {
        let config = GuestConfig::parse(FULL).expect("a configuration");
        assert_eq!(
            config.text(&[]),
            "#web server\nboot: order=scsi0\nmemory: 2048\nscsi0: local-lvm:vm-100-disk-0,size=32G\n"
        );
        assert_eq!(
            config.left_out,
            [
                "lock (backup)",
                "parent (before)",
                "unused0 (local-lvm:vm-100-disk-9)",
                "pending changes",
                "section [special:cloudinit]",
                "snapshot before"
            ]
        );
    }

    #[test]
    fn tells_configurations_from_other_texts() {
        for other in ["", "one\n", "title: notes\n", "memory: 1\na b\n", "[OPTIONS]\nenable: 1\n", "a b: c\n"]
        {
            assert_eq!(GuestConfig::parse(other), None, "{other:?}");
        }
        let config = GuestConfig::parse("memory: 512\nname: x\nbrandnew: 1\n").expect("a configuration");
        assert_eq!(config.unknown, ["brandnew"]);
        let config = GuestConfig::parse("memory: 512\nname: x\nname: y\n").expect("a configuration");
        assert_eq!(config.bad_line, Some((3, "name: y".to_owned())));
    }

    #[test]
    fn settings_are_replaced_added_in_order_and_removed() {
        let mut config =
            GuestConfig::parse("#old\nboot: order=scsi0\nscsi0: a:b\n").expect("a configuration");
        config.set("memory", "512");
        config.set("scsi0", "c:d");
        config.set("vga", "std");
        config.set("description", "new");
        config.set_default("boot", "x");
        config.remove("vga");
        let map = MapEntry {
            drive: "scsi0".to_owned(),
            device: "drive-scsi0".to_owned(),
            storage: "c".to_owned(),
            format: "raw".to_owned(),
        };
        let text = config.text(std::slice::from_ref(&map));
        assert_eq!(
            text,
            "#new\nboot: order=scsi0\nmemory: 512\nscsi0: c:d\n#qmdump#map:scsi0:drive-scsi0:c:raw:\n"
        );
        assert_eq!(map_entries(&text), [map]);
    }
}
