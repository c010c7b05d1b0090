//! The settings of a Proxmox VE guest and the values that they take, from qm.conf(5) of Proxmox VE 9.

use imgtool_core::{parse_size, suggest};

use Kind::{Bool, DiskSize, DnsName, Form, Mac, Number, OneOf, Properties, Text, Whole};

mod values;

/// Values that a setting or a property takes.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// 0 or 1, or a word for them.
    Bool,
    /// A whole number within these bounds.
    Whole(u64, u64),
    /// A number within these bounds, with a fraction or without.
    Number(f64, f64),
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A name for the domain name system.
    DnsName,
    /// A MAC address of one adapter.
    Mac,
    /// Bytes, with K, M, G or T.
    DiskSize,
    /// What this function accepts, and its name.
    Form(fn(&str) -> bool, &'static str),
    /// Anything.
    Text,
    /// `VALUE,NAME=VALUE…`. The first property needs no name.
    Properties(&'static [Property]),
}

/// Name and values of a property.
type Property = (&'static str, Kind);

/// A setting.
struct Key {
    name: &'static str,
    /// Number of settings `name0`, `name1` …; 0 for a single one without a number.
    count: u32,
    kind: Kind,
}

const fn one(name: &'static str, kind: Kind) -> Key {
    Key { name, count: 0, kind }
}

const fn many(name: &'static str, count: u32, kind: Kind) -> Key {
    Key { name, count, kind }
}

/// No upper bound.
const ANY: u64 = u64::MAX;

/// Formats of volumes.
const FORMATS: Kind = OneOf(&["cloop", "qcow", "qcow2", "qed", "raw", "vmdk"]);

/// Properties of a disk or CD-ROM, of all buses together.
const DRIVE: Kind = Properties(&[
    ("file", Text),
    ("aio", OneOf(&["io_uring", "native", "threads"])),
    ("backup", Bool),
    ("bps", Whole(0, ANY)),
    ("bps_max_length", Whole(1, ANY)),
    ("bps_rd", Whole(0, ANY)),
    ("bps_rd_length", Whole(1, ANY)),
    ("bps_rd_max_length", Whole(1, ANY)),
    ("bps_wr", Whole(0, ANY)),
    ("bps_wr_length", Whole(1, ANY)),
    ("bps_wr_max_length", Whole(1, ANY)),
    ("cache", OneOf(&["directsync", "none", "unsafe", "writeback", "writethrough"])),
    ("cyls", Whole(0, ANY)),
    ("detect_zeroes", Bool),
    ("discard", OneOf(&["ignore", "on"])),
    ("format", FORMATS),
    ("heads", Whole(0, ANY)),
    ("import-from", Text),
    ("iops", Whole(0, ANY)),
    ("iops_max", Whole(0, ANY)),
    ("iops_max_length", Whole(1, ANY)),
    ("iops_rd", Whole(0, ANY)),
    ("iops_rd_length", Whole(1, ANY)),
    ("iops_rd_max", Whole(0, ANY)),
    ("iops_rd_max_length", Whole(1, ANY)),
    ("iops_wr", Whole(0, ANY)),
    ("iops_wr_length", Whole(1, ANY)),
    ("iops_wr_max", Whole(0, ANY)),
    ("iops_wr_max_length", Whole(1, ANY)),
    ("iothread", Bool),
    ("mbps", Number(0.0, f64::MAX)),
    ("mbps_max", Number(0.0, f64::MAX)),
    ("mbps_rd", Number(0.0, f64::MAX)),
    ("mbps_rd_max", Number(0.0, f64::MAX)),
    ("mbps_wr", Number(0.0, f64::MAX)),
    ("mbps_wr_max", Number(0.0, f64::MAX)),
    ("media", OneOf(&["cdrom", "disk"])),
    ("model", Text),
    ("product", Text),
    ("queues", Whole(2, ANY)),
    ("replicate", Bool),
    ("rerror", OneOf(&["ignore", "report", "stop"])),
    ("ro", Bool),
    ("scsiblock", Bool),
    ("secs", Whole(0, ANY)),
    ("serial", Text),
    ("shared", Bool),
    ("size", DiskSize),
    ("snapshot", Bool),
    ("ssd", Bool),
    ("trans", OneOf(&["auto", "lba", "none"])),
    ("vendor", Text),
    ("werror", OneOf(&["enospc", "ignore", "report", "stop"])),
    ("wwn", Text),
]);

/// Properties of a network adapter. Each model is also the name of a property whose value is the MAC address.
const NETWORK: Kind = Properties(&[
    ("model", OneOf(MODELS)),
    ("bridge", Text),
    ("firewall", Bool),
    ("host-tunnel", Bool),
    ("link_down", Bool),
    ("macaddr", Mac),
    ("mtu", Whole(1, 65520)),
    ("queues", Whole(0, 64)),
    ("rate", Number(0.0, f64::MAX)),
    ("tag", Whole(1, 4094)),
    ("trunks", Text),
    ("e1000", Mac),
    ("e1000-82540em", Mac),
    ("e1000-82544gc", Mac),
    ("e1000-82545em", Mac),
    ("e1000e", Mac),
    ("i82551", Mac),
    ("i82557b", Mac),
    ("i82559er", Mac),
    ("ne2k_isa", Mac),
    ("ne2k_pci", Mac),
    ("pcnet", Mac),
    ("rtl8139", Mac),
    ("virtio", Mac),
    ("vmxnet3", Mac),
]);

/// Models of network adapters.
const MODELS: &[&str] = &[
    "e1000",
    "e1000-82540em",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "i82551",
    "i82557b",
    "i82559er",
    "ne2k_isa",
    "ne2k_pci",
    "pcnet",
    "rtl8139",
    "virtio",
    "vmxnet3",
];

/// All settings that a user may give.
const KEYS: &[Key] = &[
    one("acpi", Bool),
    one("affinity", values::AFFINITY),
    one(
        "agent",
        Properties(&[
            ("enabled", Bool),
            ("freeze-fs", Bool),
            ("freeze-fs-on-backup", Bool),
            ("fstrim_cloned_disks", Bool),
            ("type", OneOf(&["isa", "virtio"])),
        ]),
    ),
    one("allow-ksm", Bool),
    one("amd-sev", Text),
    one("arch", OneOf(&["aarch64", "x86_64"])),
    one("args", Text),
    many("audio", 1, values::AUDIO),
    one("autostart", Bool),
    one("balloon", Whole(0, ANY)),
    one("bios", OneOf(&["ovmf", "seabios"])),
    one("boot", values::BOOT),
    one("bootdisk", values::BOOT_DISK),
    one("cdrom", Text),
    one("cicustom", Text),
    one("cipassword", Text),
    one("citype", OneOf(&["configdrive2", "nocloud", "opennebula"])),
    one("ciupgrade", Bool),
    one("ciuser", Text),
    one("cores", Whole(1, ANY)),
    one("cpu", values::CPU),
    one("cpulimit", Number(0.0, 128.0)),
    one("cpuunits", Whole(1, 500_000)),
    one("description", Text),
    many(
        "efidisk",
        1,
        Properties(&[
            ("file", Text),
            ("efitype", OneOf(&["2m", "4m"])),
            ("format", FORMATS),
            ("import-from", Text),
            ("ms-cert", OneOf(&["2011", "2023", "2023k", "2023w"])),
            ("pre-enrolled-keys", Bool),
            ("size", DiskSize),
        ]),
    ),
    one("freeze", Bool),
    one("hookscript", Text),
    many("hostpci", 16, values::HOSTPCI),
    one("hotplug", values::HOTPLUG),
    one("hugepages", OneOf(&["1024", "2", "any"])),
    many("ide", 4, DRIVE),
    one("intel-tdx", Text),
    many("ipconfig", 32, values::IPCONFIG),
    one("ivshmem", values::IVSHMEM),
    one("keephugepages", Bool),
    one("keyboard", values::KEYBOARD),
    one("kvm", Bool),
    one("localtime", Bool),
    one("machine", values::MACHINE),
    one("memory", Properties(&[("current", Whole(16, ANY))])),
    one("migrate_downtime", Number(0.0, f64::MAX)),
    one("migrate_speed", Whole(0, ANY)),
    one("name", DnsName),
    one("nameserver", Text),
    many("net", 32, NETWORK),
    one("numa", Bool),
    many("numa", 8, values::NUMA),
    one("onboot", Bool),
    one(
        "ostype",
        OneOf(&[
            "l24", "l26", "other", "solaris", "w2k", "w2k3", "w2k8", "win10", "win11", "win7", "win8",
            "wvista", "wxp",
        ]),
    ),
    many("parallel", 3, values::PARALLEL),
    one("protection", Bool),
    one("reboot", Bool),
    many("rng", 1, values::RNG),
    many("sata", 6, DRIVE),
    many("scsi", 31, DRIVE),
    one("scsihw", OneOf(&["lsi", "lsi53c810", "megasas", "pvscsi", "virtio-scsi-pci", "virtio-scsi-single"])),
    one("searchdomain", Text),
    many("serial", 4, values::SERIAL),
    one("shares", Whole(0, 50_000)),
    one("smbios1", values::SMBIOS),
    one("smp", Whole(1, ANY)),
    one("sockets", Whole(1, ANY)),
    one("spice_enhancements", values::SPICE),
    one("sshkeys", Text),
    one("startdate", values::START_DATE),
    one("startup", values::STARTUP),
    one("tablet", Bool),
    one("tags", Text),
    one("tdf", Bool),
    one("template", Bool),
    many(
        "tpmstate",
        1,
        Properties(&[
            ("file", Text),
            ("format", OneOf(&["qcow2", "raw", "vmdk"])),
            ("import-from", Text),
            ("size", DiskSize),
            ("version", OneOf(&["v1.2", "v2.0"])),
        ]),
    ),
    many("usb", 15, values::USB),
    one("vcpus", Whole(1, ANY)),
    one("vga", values::VGA),
    many("virtio", 16, DRIVE),
    many("virtiofs", 10, Text),
    one("vmgenid", values::GENERATION),
    one("vmstatestorage", Text),
    one("watchdog", values::WATCHDOG),
];

/// Settings that Proxmox VE keeps for itself, with the reason why a backup has none.
const INTERNAL: &[(&str, &str)] = &[
    ("lock", "a backup holds no lock"),
    ("parent", "a backup holds no snapshots"),
    ("snaptime", "a backup holds no snapshots"),
    ("vmstate", "a backup holds no saved state"),
    ("digest", "Proxmox computes it"),
    ("meta", "Proxmox notes in it how the guest was made"),
];

/// A key or value that Proxmox VE does not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// The fault, for the message.
    pub what: String,
    /// The setting that the user meant (`memory=4096` for `memory=4G`), if known.
    pub meant: Option<String>,
    /// Advice on a valid value.
    pub advice: Advice,
}

/// Advice on a valid setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advice {
    /// A sentence.
    Text(String),
    /// A setting that is valid, as an example: `memory=4096 (MiB)`.
    Example(String),
}

impl Wrong {
    fn new(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { what: what.into(), meant: None, advice: Advice::Text(advice.into()) }
    }
}

/// True if a guest's configuration can have this setting.
pub fn is_known(key: &str) -> bool {
    find(key).is_some() || is_internal(key) || is_unused(key)
}

/// True for the reference to a volume that the guest does not use (`unused0`).
pub fn is_unused(key: &str) -> bool {
    key.strip_prefix("unused").is_some_and(|number| number.parse::<u32>().is_ok())
}

fn is_internal(key: &str) -> bool {
    INTERNAL.iter().any(|(name, _)| *name == key)
        || ["running", "snap"].iter().any(|prefix| key.starts_with(prefix))
}

fn find(key: &str) -> Option<&'static Key> {
    let end = key.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let (front, number) = key.split_at(end);
    // Settings such as smbios1 have a digit in their name.
    let single = KEYS.iter().find(|known| known.count == 0 && known.name == key);
    single.or_else(|| {
        let is_plain = number == "0" || !number.starts_with('0');
        let number: u32 = number.parse().ok().filter(|_| is_plain)?;
        KEYS.iter().find(|known| known.name == front && number < known.count)
    })
}

/// Returns what is wrong with the value of a setting that a guest's configuration has; `None` also for settings that
/// Proxmox VE keeps for itself, and for unknown ones.
pub fn wrong_value(key: &str, value: &str) -> Option<String> {
    let known = find(key).filter(|_| !is_internal(key))?;
    check_value(known.kind, value).err()
}

/// Checks a setting.
///
/// # Errors
/// A sentence on what is wrong, and what to give instead.
pub fn check(key: &str, value: &str) -> Result<(), Wrong> {
    if let Some((_, why)) = INTERNAL.iter().find(|(name, _)| *name == key) {
        return Err(Wrong::new(format!("'{key}' can't be set: {why}"), "leave it out"));
    }
    if is_unused(key) {
        return Err(Wrong::new(
            format!("'{key}' can't be set: an archive holds only drives in use"),
            "give the disk as a source, such as scsi1=PATH",
        ));
    }
    let Some(known) = find(key) else { return Err(unknown(key)) };
    let advice = || expected(known.kind, key);
    if value.is_empty() {
        return Err(Wrong { what: format!("'{key}' has no value"), meant: None, advice: advice() });
    }
    check_value(known.kind, value).map_err(|what| {
        let meant = in_mebibytes(key, value).map(|mebibytes| format!("{key}={mebibytes}"));
        Wrong { what, meant, advice: advice() }
    })
}

fn unknown(key: &str) -> Wrong {
    let front = key.trim_end_matches(|c: char| c.is_ascii_digit());
    if let Some(known) = KEYS.iter().find(|known| known.name == front && known.count > 0) {
        let last = known.count - 1;
        let range = if last == 0 { format!("{front}0 alone") } else { format!("{front}0 to {front}{last}") };
        return Wrong::new(format!("Proxmox has no setting '{key}'"), format!("there is {range}"));
    }
    let nearest = suggest::nearest(key, KEYS.iter().map(|known| known.name));
    let numbered = |name: &str| KEYS.iter().any(|known| known.name == name && known.count > 0);
    let hint = match nearest {
        Some(name) if numbered(name) => format!("did you mean '{name}0'?"),
        Some(name) => format!("did you mean '{name}'?"),
        None => {
            "qm.conf(5) of Proxmox VE lists all settings; common: name, memory, cores, net0, ostype, bios"
                .to_owned()
        }
    };
    Wrong::new(format!("Proxmox has no setting '{key}'"), hint)
}

/// Returns the value in MiB, for a setting that counts them, if the user wrote a unit.
fn in_mebibytes(key: &str, value: &str) -> Option<u64> {
    let bytes = parse_size(value.strip_suffix("iB").or(value.strip_suffix('B')).unwrap_or(value));
    bytes.map(|bytes| bytes >> 20).filter(|mebibytes| matches!(key, "memory" | "balloon") && *mebibytes >= 16)
}

fn check_value(kind: Kind, value: &str) -> Result<(), String> {
    let is_valid = match kind {
        Bool => {
            ["0", "1", "on", "off", "yes", "no", "true", "false"].contains(&value.to_lowercase().as_str())
        }
        Whole(least, most) => value.parse::<u64>().is_ok_and(|n| (least..=most).contains(&n)),
        Number(least, most) => value.parse::<f64>().is_ok_and(|n| (least..=most).contains(&n)),
        OneOf(words) => words.contains(&value),
        DnsName => is_dns_name(value),
        Mac => is_mac(value),
        DiskSize => {
            let number = value.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or(value);
            number.parse::<f64>().is_ok_and(|n| n >= 0.0)
        }
        Form(accepts, _) => accepts(value),
        Text => true,
        Properties(known) => return check_properties(known, value),
    };
    if is_valid { Ok(()) } else { Err(format!("'{value}' is not {}", noun(kind))) }
}

fn check_properties(known: &[Property], text: &str) -> Result<(), String> {
    for (index, part) in text.split(',').enumerate() {
        let (name, value) = match part.split_once('=') {
            Some((name, value)) if known.iter().any(|(known, _)| *known == name) || index > 0 => {
                (name, value)
            }
            // A volume may contain an equals sign.
            _ if index == 0 => (known.first().map_or("", |(name, _)| name), part),
            _ => return Err(format!("'{part}' is not NAME=VALUE")),
        };
        let Some((_, kind)) = known.iter().find(|(known, _)| *known == name) else {
            let near = suggest::nearest(name, known.iter().map(|(name, _)| *name));
            let near = near.map_or_else(String::new, |name| format!("; did you mean '{name}'?"));
            return Err(format!("has no property '{name}'{near}"));
        };
        check_value(*kind, value).map_err(|what| match index {
            0 => what,
            _ => format!("{name}: {what}"),
        })?;
    }
    Ok(())
}

fn is_dns_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let is_inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
        (1..=63).contains(&label.len())
            && label.chars().all(is_inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.split('.').all(is_label)
}

fn is_mac(text: &str) -> bool {
    let octets: Vec<&str> = text.split(':').collect();
    let is_octet = |octet: &&str| octet.len() == 2 && octet.chars().all(|c| c.is_ascii_hexdigit());
    octets.len() == 6 && octets.iter().all(is_octet)
}

/// Names the values of a kind: "a whole number of at least 16".
fn noun(kind: Kind) -> String {
    match kind {
        Bool => "0 or 1".to_owned(),
        Whole(least, ANY) => format!("a whole number of at least {least}"),
        Whole(least, most) => format!("a whole number from {least} to {most}"),
        Number(least, f64::MAX) => format!("a number of at least {least}"),
        Number(least, most) => format!("a number from {least} to {most}"),
        OneOf(words) => format!("one of {}", words.join(", ")),
        DnsName => "a name of letters, digits, '-' and '.'".to_owned(),
        Mac => "a MAC address".to_owned(),
        DiskSize => "a size such as 32G".to_owned(),
        Form(_, noun) => noun.to_owned(),
        Text => "a text".to_owned(),
        Properties(known) => known.first().map_or_else(String::new, |(_, kind)| noun(*kind)),
    }
}

/// Says by an example what a setting takes.
fn expected(kind: Kind, key: &str) -> Advice {
    let example = match (key, kind) {
        ("memory" | "balloon", _) => "4096 (MiB)".to_owned(),
        ("name", _) => "web-1".to_owned(),
        ("ostype", _) => "l26".to_owned(),
        ("scsihw", _) => "virtio-scsi-single".to_owned(),
        (_, Bool) => "1".to_owned(),
        (_, OneOf(words)) => words.first().map_or_else(String::new, |word| (*word).to_owned()),
        (_, Whole(least, _)) => least.max(1).to_string(),
        _ if key.starts_with("net") => "virtio,bridge=vmbr0".to_owned(),
        (_, Form(_, noun)) => return Advice::Text(format!("{key} takes {noun}")),
        (_, Properties([("file", _), ..])) => "local-lvm:vm-100-disk-0,size=32G".to_owned(),
        _ => return Advice::Text(format!("qm.conf(5) of Proxmox VE describes {key}")),
    };
    Advice::Example(format!("{key}={example}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_qm_conf_documents() {
        for (key, value) in [
            ("memory", "4096"),
            ("memory", "current=4096"),
            ("name", "web-1.example.org"),
            ("net0", "virtio,bridge=vmbr0"),
            ("net31", "virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1,tag=12"),
            ("scsi30", "local-lvm:vm-100-disk-0,discard=on,iothread=1,size=32G,ssd=1"),
            ("virtio0", "file=local:100/vm-100-disk-0.qcow2,cache=writeback"),
            ("ide2", "none,media=cdrom"),
            ("efidisk0", "local:100/vm-100-disk-0.raw,efitype=4m,pre-enrolled-keys=1,size=528K"),
            ("tpmstate0", "local:100/vm-100-disk-1.raw,size=4M,version=v2.0"),
            ("agent", "enabled=1,fstrim_cloned_disks=1"),
            ("agent", "1"),
            ("cpulimit", "1.5"),
            ("smbios1", "uuid=3e1b0ee5-0000-0000-0000-000000000000"),
            ("numa", "1"),
            ("numa0", "cpus=0-1"),
            ("onboot", "yes"),
        ] {
            assert_eq!(check(key, value), Ok(()), "{key}={value}");
        }
    }

    #[test]
    fn refuses_unknown_settings_and_values_with_advice() {
        for (key, value, what, hint) in [
            ("memroy", "512", "no setting 'memroy'", "did you mean 'memory'"),
            ("nett0", "virtio", "no setting 'nett0'", "did you mean 'net0'"),
            ("scsi31", "a:b", "no setting 'scsi31'", "scsi0 to scsi30"),
            ("scsi00", "a:b", "no setting 'scsi00'", "scsi0 to scsi30"),
            ("efidisk1", "a:b", "no setting", "efidisk0 alone"),
            ("memory", "abc", "'abc' is not a whole number of at least 16", "Example(\"memory=4096"),
            ("memory", "4G", "'4G' is not", "Some(\"memory=4096\")"),
            ("memory", "8", "at least 16", "memory"),
            ("cores", "0", "at least 1", "cores=1"),
            ("name", "my_vm", "letters, digits", "name=web-1"),
            ("name", "", "no value", "name=web-1"),
            ("ostype", "linux", "one of l24", "ostype"),
            ("net0", "virtio,brigde=vmbr0", "did you mean 'bridge'", "net0="),
            ("net0", "virtio=12:34,bridge=vmbr0", "a MAC address", "net0="),
            ("scsi0", "local:a,size=big", "size: 'big' is not a size", "scsi0="),
            ("unused0", "local:a", "only drives in use", "scsi1=PATH"),
            ("lock", "backup", "no lock", "leave it out"),
        ] {
            let wrong = check(key, value).expect_err(key);
            assert!(wrong.what.contains(what), "{key}={value}: {wrong:?}");
            assert!(
                format!("{:?} {:?}", wrong.meant, wrong.advice).contains(hint),
                "{key}={value}: {wrong:?}"
            );
        }
    }
}
