//! Compares an image with the rules of a platform.

use std::sync::Arc;

use imgtool_core::machine::{DriveKind, Firmware};
use imgtool_core::{Device, DeviceKind, Disk, ErrorKind, Fact, ImageInfo, ImageSource, Result};
use serde::Serialize;

use crate::glimpse::Glimpse;
use crate::guest::Guest;
use crate::platform::{Generation, Platform};
use crate::rules::{FactRule, Form, SizeRule, Values};

/// Weight of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// The platform refuses the image.
    Breach,
    /// The platform takes the image; the user should know this.
    Note,
}

/// What an image has that a rule does not want.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// Name of the rule.
    pub rule: &'static str,
    /// Weight.
    pub severity: Severity,
    /// Name of the disk; untrusted. `None` for the image as a whole.
    pub disk: Option<String>,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub advice: String,
}

/// Result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Findings, in the order of the rules.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// True if the platform takes the image.
    pub fn fits(&self) -> bool {
        self.breaches().next().is_none()
    }

    /// Returns the findings for which the platform refuses the image.
    pub fn breaches(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.severity == Severity::Breach)
    }

    fn add(&mut self, rule: &'static str, is_breach: bool, found: String, advice: impl Into<String>) {
        let severity = if is_breach { Severity::Breach } else { Severity::Note };
        self.findings.push(Finding { rule, severity, disk: None, found, advice: advice.into() });
    }
}

/// An image to be judged.
#[derive(Debug)]
pub struct Subject<'a> {
    /// File name, if the image has one.
    pub name: Option<&'a str>,
    /// Compressions of the whole file, outermost first.
    pub compressions: Vec<&'a str>,
    /// Facts about the image.
    pub info: &'a ImageInfo,
    /// What its disks contain, in the order of [`Subject::disks`]. Empty if they were not looked at.
    pub guests: Vec<Guest>,
}

impl<'a> Subject<'a> {
    /// Looks at the disks of an open image. Reads a stream to its end.
    ///
    /// # Errors
    /// Any error of reading the image.
    pub fn look(
        name: Option<&'a str>,
        compressions: Vec<&'a str>,
        image: &'a Arc<dyn ImageSource>,
    ) -> Result<Self> {
        let mut subject = Self { name, compressions, info: image.info(), guests: Vec::new() };
        let sector_size =
            subject.fact("logical-sector-size").and_then(|fact| text(fact).first()?.parse().ok());
        let sector_size = sector_size.unwrap_or(512);
        if image.access().is_stream() {
            match Glimpse::read(&**image) {
                Ok(glimpse) => subject.guests.push(Guest::look(&glimpse, sector_size)?),
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                Err(error) => return Err(error),
            }
            return Ok(subject);
        }
        for device in subject.disks() {
            let guest = Guest::look(&Disk::new(Arc::clone(image), device.id)?, sector_size);
            subject.guests.push(guest.map_err(|error| error.device(&*device.name))?);
        }
        Ok(subject)
    }

    /// Returns the disks of the guest: neither firmware variables nor the state of a TPM or of a running
    /// machine.
    pub fn disks(&self) -> Vec<&'a Device> {
        let machine = self.info.machine.as_ref();
        let is_state = |device: &&Device| {
            let drive = machine.and_then(|machine| machine.drive(&device.name));
            drive.is_some_and(|drive| drive.kind != DriveKind::Disk)
        };
        let disks = self.info.devices.iter().filter(|device| device.kind == DeviceKind::Disk);
        disks.filter(|device| !is_state(device)).collect()
    }

    fn fact(&self, key: &str) -> Option<&'a Fact> {
        self.info.facts.iter().find(|fact| fact.key == key)
    }
}

/// Returns the values of a fact as text: those of a list, or the only one.
fn text(fact: &Fact) -> Vec<String> {
    let word = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match &fact.value {
        serde_json::Value::Array(values) => values.iter().map(word).collect(),
        value => vec![word(value)],
    }
}

impl Platform {
    /// Returns the forms that the platform takes.
    pub fn forms(&self) -> impl Iterator<Item = &'static Form> {
        let generation = self.generation;
        let fits = move |form: &&Form| {
            form.generation.is_none() || generation.is_none() || form.generation == generation
        };
        self.rules.forms.iter().filter(fits)
    }

    /// Lists the forms for people: "vhd, or tar in gzip".
    pub fn forms_in_words(&self) -> String {
        let word = |form: &Form| match form.compressions.first() {
            Some(Some(compression)) => format!("{} in {compression}", form.format),
            _ => form.format.to_owned(),
        };
        self.forms().map(word).collect::<Vec<_>>().join(", ")
    }

    /// Compares an image with the rules.
    pub fn check(&self, subject: &Subject<'_>) -> Verdict {
        let mut verdict = Verdict::default();
        let Some(form) = self.forms().find(|form| form.format == subject.info.format) else {
            let advice = format!("convert it: {self} takes {}", self.forms_in_words());
            verdict.add("format", true, format!("the format is {}", subject.info.format), advice);
            return verdict;
        };
        form.check_file(subject, &mut verdict);
        for rule in form.facts {
            rule.check(subject, &mut verdict);
        }
        check_parts(subject, &mut verdict);
        for device in subject.disks() {
            let first = verdict.findings.len();
            form.size.check(device.size, &mut verdict);
            verdict.findings[first..].iter_mut().for_each(|finding| finding.disk = Some(device.name.clone()));
        }
        self.check_count(subject, &mut verdict);
        self.check_guests(subject, &mut verdict);
        verdict
    }

    fn check_count(&self, subject: &Subject<'_>, verdict: &mut Verdict) {
        let (count, most) = (subject.disks().len(), self.rules.max_disks);
        if let Some(most) = most.filter(|most| count > *most) {
            let found = format!("{count} disks; the limit of {self} is {most}");
            verdict.add("disks", true, found, "leave out disks, and import them one by one");
        }
    }

    /// Compares what the disks contain.
    fn check_guests(&self, subject: &Subject<'_>, verdict: &mut Verdict) {
        for (device, guest) in subject.disks().into_iter().zip(&subject.guests) {
            let first = verdict.findings.len();
            self.check_guest(guest, verdict);
            verdict.findings[first..].iter_mut().for_each(|finding| finding.disk = Some(device.name.clone()));
        }
        let boots_uefi = subject.guests.iter().any(|guest| guest.boots_uefi);
        let boots_bios = subject.guests.iter().any(|guest| guest.boots_bios);
        self.check_firmware(subject, (boots_bios, boots_uefi), verdict);
    }

    fn check_guest(&self, guest: &Guest, verdict: &mut Verdict) {
        if let Some(size) = guest.foreign_sectors() {
            let found = format!(
                "the partition table counts sectors of {size} bytes, the guest sees {}: the disk looks empty",
                guest.sector_size
            );
            verdict.add(
                "sectors",
                false,
                found,
                format!("give the disk sectors of {size} bytes, if the format has them"),
            );
        }
        if guest.lacks_backup {
            let found = "the backup header of the GPT is not at the end of the disk".to_owned();
            verdict.add(
                "gpt-end",
                false,
                found,
                "guests start all the same; 'sgdisk -e' in the guest moves it",
            );
        }
        if let Some(advice) = self.rules.windows.filter(|_| guest.is_windows) {
            verdict.add("drivers", false, "the disk is one of Windows".to_owned(), advice);
        }
    }

    /// Compares the firmware for which the disks have a start with that of the machine.
    fn check_firmware(&self, subject: &Subject<'_>, boots: (bool, bool), verdict: &mut Verdict) {
        const BIOS_ALONE: &str = "the disk starts with a BIOS, and has no EFI system partition";
        const UEFI_ALONE: &str = "the disk starts with UEFI alone";
        let firmware = subject.info.machine.as_ref().map(|machine| machine.firmware);
        match (self.generation, boots) {
            (Some(Generation::Two), (true, false)) => {
                // Windows writes the code onto disks of data as well.
                let starts = !subject.guests.iter().all(Guest::is_data);
                verdict.add(
                    "firmware",
                    starts,
                    BIOS_ALONE.to_owned(),
                    "choose generation 1, if a guest starts from it",
                );
            }
            (Some(Generation::Two), (_, true)) if !subject.guests.iter().any(Guest::has_gpt) => {
                let found =
                    "the EFI system partition is in an MBR, generation 2 starts from a GPT".to_owned();
                verdict.add("firmware", true, found, "'sgdisk -g' in the guest converts the partition table");
            }
            (Some(Generation::One), (false, true)) => {
                verdict.add("firmware", true, UEFI_ALONE.to_owned(), "choose generation 2");
            }
            (_, (true, false)) if firmware == Some(Firmware::Uefi) => {
                let found = format!("the machine has UEFI, but {BIOS_ALONE}");
                verdict.add("firmware", false, found, "choose a BIOS for the machine");
            }
            (_, (false, true)) if firmware == Some(Firmware::Bios) => {
                let found = format!("the machine has a BIOS, but {UEFI_ALONE}");
                verdict.add("firmware", false, found, "choose UEFI for the machine");
            }
            (None, (true, false)) => {
                let advice = self.rules.bios_only;
                advice
                    .into_iter()
                    .for_each(|advice| verdict.add("firmware", false, BIOS_ALONE.to_owned(), advice));
            }
            (None, (false, true)) => {
                let advice = self.rules.uefi_only;
                advice
                    .into_iter()
                    .for_each(|advice| verdict.add("firmware", false, UEFI_ALONE.to_owned(), advice));
            }
            _ => {}
        }
    }
}

impl Form {
    /// True if the name of a file ends as that of an image of this form.
    pub fn takes_extension(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        let fits = |end: &&str| name.len() > end.len() && name.ends_with(*end);
        self.extensions.is_empty() || self.extensions.iter().any(fits)
    }

    /// True if a file of this name can have this form.
    pub fn takes_name(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        let stem = |end: &&str| name.strip_suffix(*end).filter(|stem| !stem.is_empty());
        let fits = |stem: &str| self.stem.is_none_or(|pattern| has_shape(stem, pattern));
        self.extensions.is_empty() || self.extensions.iter().filter_map(stem).any(fits)
    }

    /// Compares the name and the compression of the file.
    fn check_file(&self, subject: &Subject<'_>, verdict: &mut Verdict) {
        let found = subject.compressions.as_slice();
        let fits = self.compressions.iter().any(|known| known.as_slice() == found);
        if !fits {
            let found = match found {
                [] => "the file is not compressed".to_owned(),
                layers => format!("the file is compressed with {}", layers.join(", and ")),
            };
            let advice = match self.compressions {
                [None] => "undo the compression".to_owned(),
                known => {
                    let names: Vec<&str> = known.iter().map(|known| known.unwrap_or("none")).collect();
                    format!("the compression must be {}", names.join(" or "))
                }
            };
            verdict.add("compression", true, found, advice);
        }
        if let Some(name) = subject.name.filter(|name| !self.takes_name(name)) {
            verdict.add("name", true, format!("the file is called '{name}'"), self.names_in_words());
        }
    }

    /// Says what the name of a file must be like.
    pub fn names_in_words(&self) -> String {
        let ends = self.extensions.join(" or ");
        match self.stem {
            Some(shape) => {
                format!("the name must be like {}, and end in {ends}", shape.replace('#', "100"))
            }
            None => format!("the name must end in {ends}"),
        }
    }
}

/// True if `text` is like `pattern`, in which `#` stands for a number and `0` for a digit.
fn has_shape(text: &str, pattern: &str) -> bool {
    let mut text = text;
    for wanted in pattern.chars() {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let len = match wanted {
            '#' => digits,
            '0' => usize::from(digits > 0),
            other => text.strip_prefix(other).map_or(0, |_| other.len_utf8()),
        };
        if len == 0 {
            return false;
        }
        text = &text[len..];
    }
    text.is_empty()
}

impl FactRule {
    fn check(&self, subject: &Subject<'_>, verdict: &mut Verdict) {
        let Some(fact) = subject.fact(self.key) else {
            // Every driver states those that matter.
            return;
        };
        let values = text(fact);
        let fits = match self.values {
            Values::OneOf(known) => values.iter().all(|value| known.contains(&value.as_str())),
            Values::Begins(start) => {
                values.iter().flat_map(|value| value.split(' ')).any(|word| word.starts_with(start))
            }
        };
        if !fits {
            let found = format!("{} is {}", fact.label, values.join(", "));
            verdict.add(self.rule, self.is_strict, found, self.advice);
        }
    }
}

impl SizeRule {
    /// Returns the smallest size that the platform takes for a disk of `size` bytes; `None` if there is none.
    pub fn round_up(&self, size: u64) -> Option<u64> {
        size.max(self.min).checked_next_multiple_of(self.multiple).filter(|size| *size <= self.max)
    }

    /// Compares the size of a disk.
    pub fn check(&self, size: u64, verdict: &mut Verdict) {
        if size > self.max {
            let found = format!("the disk has {size} bytes; the limit is {}", self.max);
            verdict.add("size", true, found, "shrink it, or spread its content over several disks");
            return;
        }
        let Some(next) = self.round_up(size).filter(|next| *next != size) else { return };
        let (found, is_strict) = match size < self.min {
            true => (format!("the disk has {size} bytes; the minimum is {}", self.min), true),
            false => (format!("the disk has {size} bytes, no multiple of {}", self.multiple), self.is_strict),
        };
        verdict.add("size", is_strict, found, format!("round it up to {next} bytes"));
    }
}

/// Compares what belongs to an image besides its file.
fn check_parts(subject: &Subject<'_>, verdict: &mut Verdict) {
    for reference in subject.info.references.iter().filter(|reference| reference.role != "extent") {
        let found = format!("the image has a {}, '{}'", reference.role, reference.name);
        verdict.add("references", true, found, "convert it to an image that needs no other");
    }
    if subject.fact("encrypted").is_some_and(|fact| fact.value == true) {
        verdict.add("encryption", true, "the image is encrypted".to_owned(), "convert it to one that is not");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use imgtool_core::Machine;

    use super::*;
    use crate::partitions::{PartitionTable, Scheme};

    /// Platform, file name, compressions, facts, and the rules that are broken.
    type Case<'a> = (&'a str, &'a str, &'a [&'a str], ImageInfo, &'a [&'a str]);

    fn info(format: &'static str, size: u64, facts: &[(&'static str, &str)]) -> ImageInfo {
        let mut info =
            ImageInfo { format, devices: vec![Device::disk(0, "a", size)], ..ImageInfo::default() };
        facts.iter().for_each(|(key, value)| info.fact(key, key, *value));
        info
    }

    fn rules_broken(
        platform: &str,
        name: &str,
        compression: &[&str],
        info: &ImageInfo,
        guests: Vec<Guest>,
    ) -> Vec<String> {
        let subject = Subject { name: Some(name), compressions: compression.to_vec(), info, guests };
        let found = Platform::parse(platform).unwrap().check(&subject).findings;
        let word = |finding: &Finding| match finding.severity {
            Severity::Breach => finding.rule.to_owned(),
            Severity::Note => format!("({})", finding.rule),
        };
        found.iter().map(word).collect()
    }

    #[test]
    fn every_rule_of_a_file_is_broken_once() {
        const MIB: u64 = 1 << 20;
        let fixed = [("subformat", "fixed")];
        let tar = |format, files| [("tar-format", format), ("files", files)];
        let ova = |system, formats, variants| {
            [("system-type", system), ("disk-formats", formats), ("disk-variants", variants)]
        };
        let stream = [("create-type", "streamOptimized")];
        let cases: &[Case<'_>] = &[
            ("azure", "a.vhd", &[], info("vhd", 20 * MIB, &fixed), &[]),
            ("azure", "a.qcow2", &[], info("qcow2", 20 * MIB, &[]), &["format"]),
            ("azure", "a.vhd", &[], info("vhd", 20 * MIB, &[("subformat", "dynamic")]), &["variant"]),
            ("azure", "a.vhd", &[], info("vhd", 20 * MIB + 512, &fixed), &["size"]),
            ("azure", "a.vhd", &[], info("vhd", MIB, &fixed), &["size"]),
            ("azure", "a.vhd", &[], info("vhd", 33 << 40, &fixed), &["size"]),
            ("azure", "a.img", &["gzip"], info("vhd", 20 * MIB, &fixed), &["compression", "name"]),
            ("hyperv", "a.vhdx", &[], info("vhdx", 20 * MIB + 512, &[("subformat", "dynamic")]), &["size"]),
            ("hyperv", "a.vhdx", &[], info("vhdx", MIB, &[("subformat", "differencing")]), &["variant"]),
            ("hyperv", "a.vhdx", &[], info("vhdx", MIB, &[("logical-sector-size", "4096")]), &["(sectors)"]),
            ("hyperv", "a.vhdx", &[], info("vhdx", MIB, &[("physical-sector-size", "512")]), &["(sectors)"]),
            ("hyperv:gen1", "a.vhd", &[], info("vhd", MIB, &fixed), &[]),
            ("hyperv:gen2", "a.vhd", &[], info("vhd", MIB, &fixed), &["format"]),
            ("gce", "a.tar.gz", &["gzip"], info("tar", 1 << 30, &tar("oldgnu", "disk.raw")), &[]),
            (
                "gce",
                "a.tar.gz",
                &["gzip"],
                info("tar", 1 << 30, &tar("ustar", "a.raw")),
                &["variant", "disk-name"],
            ),
            (
                "gce",
                "a.tar",
                &[],
                info("tar", MIB, &tar("oldgnu", "disk.raw")),
                &["compression", "name", "size"],
            ),
            ("aws", "a.vmdk", &[], info("vmdk", MIB, &[("create-type", "seSparse")]), &["variant"]),
            ("aws", "a.vmdk", &[], info("vmdk", MIB + 512, &stream), &["(size)"]),
            (
                "vmware",
                "a.vmdk",
                &[],
                info("vmdk", MIB, &[("create-type", "monolithicSparse")]),
                &["variant"],
            ),
            ("vmware", "a.ova", &[], info("ova", MIB, &ova("vmx-13 vmx-14", "vmdk", "streamOptimized")), &[]),
            (
                "vmware",
                "a.ova",
                &[],
                info("ova", MIB, &ova("virtualbox-2.2", "qcow2", "")),
                &["hardware", "disks", "disks"],
            ),
            ("virtualbox", "a.vmdk", &[], info("vmdk", MIB, &[("create-type", "vmfs")]), &["variant"]),
            ("virtualbox", "a.vdi", &[], info("vdi", MIB, &[("version", "0.1")]), &["variant"]),
            (
                "proxmox",
                "a.vmdk",
                &[],
                info("vmdk", MIB, &[("create-type", "twoGbMaxExtentFlat")]),
                &["variant"],
            ),
            ("proxmox", "a.vhdx", &[], info("vhdx", MIB, &[]), &["format"]),
            ("proxmox", "vm.vma.zst", &["zstd"], info("vma", MIB, &[]), &["name"]),
            ("proxmox", "vzdump-qemu-100-2026_01_31-12_00_00.vma.zst", &["zstd"], info("vma", MIB, &[]), &[]),
            ("libvirt", "a.qcow2", &["zstd"], info("qcow2", MIB, &[]), &["compression", "name"][..1]),
            ("openstack", "a.bin", &[], info("raw", MIB, &[]), &["name"]),
        ];
        for (platform, name, compression, info, expected) in cases {
            let found = rules_broken(platform, name, compression, info, Vec::new());
            assert_eq!(found, *expected, "{platform} {name}");
        }
    }

    #[test]
    fn parts_and_the_number_of_disks_are_counted() {
        let mut with_parent = info("qcow2", 1 << 20, &[]);
        let reference = |role| imgtool_core::Reference { role, name: "b".to_owned(), format: None };
        with_parent.references = vec![reference("backing file"), reference("data file"), reference("extent")];
        with_parent.top_fact("encrypted", "encrypted", true);
        let found = rules_broken("openstack", "a.qcow2", &[], &with_parent, Vec::new());
        assert_eq!(found, ["references", "references", "encryption"]);
        let mut many = info("ova", 1 << 20, &[]);
        many.devices = (0..22).map(|id| Device::disk(id, format!("d{id}"), 1 << 20)).collect();
        assert_eq!(rules_broken("aws", "a.ova", &[], &many, Vec::new()), ["disks"]);
    }

    fn guest(bios: bool, uefi: bool) -> Guest {
        let table = PartitionTable {
            scheme: Scheme::Gpt,
            sector_size: 512,
            partitions: Vec::new(),
            has_boot_code: bios,
            is_active: false,
            backup: None,
        };
        Guest { table: Some(table), sector_size: 512, boots_bios: bios, boots_uefi: uefi, ..Guest::default() }
    }

    #[test]
    fn firmware_is_compared_with_generation_and_machine() {
        let plain = info("vhdx", 1 << 20, &[]);
        for (platform, bios, uefi, expected) in [
            ("hyperv:gen2", true, false, vec!["firmware"]),
            ("hyperv:gen1", false, true, vec!["firmware"]),
            ("hyperv:gen2", true, true, vec![]),
            ("hyperv:gen1", true, true, vec![]),
            ("hyperv:gen2", false, false, vec![]),
            ("hyperv", true, false, vec!["(firmware)"]),
            ("hyperv", false, true, vec!["(firmware)"]),
        ] {
            let found = rules_broken(platform, "a.vhdx", &[], &plain, vec![guest(bios, uefi)]);
            assert_eq!(found, expected, "{platform} {bios} {uefi}");
        }
        let mut in_mbr = guest(false, true);
        in_mbr.table.as_mut().unwrap().scheme = Scheme::Mbr;
        assert_eq!(rules_broken("hyperv:gen2", "a.vhdx", &[], &plain, vec![in_mbr]), ["firmware"]);
        let mut described = info("vma", 1 << 20, &[]);
        described.machine = Some(Box::new(Machine { firmware: Firmware::Uefi, ..Machine::default() }));
        let found = rules_broken(
            "proxmox",
            "vzdump-qemu-1-2026_01_31-12_00_00.vma",
            &[],
            &described,
            vec![guest(true, false)],
        );
        assert_eq!(found, ["(firmware)"]);
    }

    #[test]
    fn disks_get_notes_and_no_refusal() {
        let plain = info("qcow2", 1 << 20, &[]);
        let odd = Guest { sector_size: 4096, is_windows: true, lacks_backup: true, ..guest(true, true) };
        let found = rules_broken("libvirt", "a.qcow2", &[], &plain, vec![odd.clone()]);
        assert_eq!(found, ["(sectors)", "(gpt-end)", "(drivers)"]);
        let plain = info("vhdx", 1 << 20, &[]);
        assert_eq!(rules_broken("hyperv", "a.vhdx", &[], &plain, vec![odd]), ["(sectors)", "(gpt-end)"]);
    }

    #[test]
    fn sizes_are_rounded_within_their_bounds() {
        let rule = SizeRule { multiple: 1 << 20, min: 20 << 20, max: 1 << 30, is_strict: true };
        assert_eq!(rule.round_up(1), Some(20 << 20));
        assert_eq!(rule.round_up((20 << 20) + 1), Some(21 << 20));
        assert_eq!(rule.round_up(1 << 30), Some(1 << 30));
        assert_eq!(rule.round_up((1 << 30) + 1), None);
        assert_eq!(rule.round_up(u64::MAX), None);
    }
}
