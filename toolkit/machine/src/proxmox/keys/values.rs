//! Properties and forms of values that are no plain number or word, from qm.conf(5) of Proxmox VE 9.

use super::super::drives::{bus_of, is_bootable};
use super::ANY;
use super::Kind::{self, Bool, Form, OneOf, Properties, Text, Whole};

/// Display of a guest.
pub(super) const VGA: Kind = Properties(&[
    (
        "type",
        OneOf(&[
            "cirrus",
            "none",
            "qxl",
            "qxl2",
            "qxl3",
            "qxl4",
            "serial0",
            "serial1",
            "serial2",
            "serial3",
            "std",
            "virtio",
            "virtio-gl",
            "vmware",
        ]),
    ),
    ("clipboard", OneOf(&["vnc"])),
    ("memory", Whole(4, 512)),
]);

/// Layouts of keyboards.
pub(super) const KEYBOARD: Kind = OneOf(&[
    "da", "de", "de-ch", "en-gb", "en-us", "es", "fi", "fr", "fr-be", "fr-ca", "fr-ch", "hu", "is", "it",
    "ja", "lt", "mk", "nl", "no", "pl", "pt", "pt-br", "sl", "sv", "tr",
]);

pub(super) const CPU: Kind = Properties(&[
    ("cputype", Form(is_cpu, "a CPU type such as host, x86-64-v2-AES or custom-NAME")),
    ("flags", Text),
    ("guest-phys-bits", Whole(32, 64)),
    ("hidden", Bool),
    ("hv-vendor-id", Text),
    ("phys-bits", Form(is_phys_bits, "a number from 8 to 64, or host")),
    ("reported-model", Form(is_cpu, "a CPU type such as kvm64")),
]);

pub(super) const MACHINE: Kind = Properties(&[
    ("type", Form(is_machine, "pc, q35, virt, or a version such as pc-q35-9.0 or pc-i440fx-9.0")),
    ("aw-bits", Whole(32, 64)),
    ("enable-s3", Bool),
    ("enable-s4", Bool),
    ("viommu", OneOf(&["intel", "virtio"])),
]);

pub(super) const WATCHDOG: Kind = Properties(&[
    ("model", OneOf(&["i6300esb", "ib700"])),
    ("action", OneOf(&["debug", "none", "pause", "poweroff", "reset", "shutdown"])),
]);

pub(super) const AUDIO: Kind = Properties(&[
    ("device", OneOf(&["AC97", "ich9-intel-hda", "intel-hda"])),
    ("driver", OneOf(&["none", "spice"])),
]);

pub(super) const STARTUP: Kind =
    Properties(&[("order", Whole(0, ANY)), ("down", Whole(0, ANY)), ("up", Whole(0, ANY))]);

pub(super) const SMBIOS: Kind = Properties(&[
    ("", Form(|_| false, "NAME=VALUE, such as uuid=01234567-89ab-cdef-0123-456789abcdef")),
    ("base64", Bool),
    ("family", Text),
    ("manufacturer", Text),
    ("product", Text),
    ("serial", Text),
    ("sku", Text),
    ("uuid", Form(is_uuid, "a UUID")),
    ("version", Text),
]);

pub(super) const IPCONFIG: Kind = Properties(&[
    ("", Form(|_| false, "NAME=VALUE, such as ip=dhcp")),
    ("gw", Form(|text| text.parse::<std::net::Ipv4Addr>().is_ok(), "an IPv4 address")),
    ("gw6", Form(|text| text.parse::<std::net::Ipv6Addr>().is_ok(), "an IPv6 address")),
    ("ip", Form(is_ip, "an IPv4 network such as 10.0.0.5/24, or dhcp")),
    ("ip6", Form(is_ip6, "an IPv6 network such as fd00::5/64, dhcp or auto")),
]);

pub(super) const RNG: Kind = Properties(&[
    ("source", OneOf(&["/dev/hwrng", "/dev/random", "/dev/urandom"])),
    ("max_bytes", Whole(0, ANY)),
    ("period", Whole(0, ANY)),
]);

pub(super) const IVSHMEM: Kind = Properties(&[
    ("", Form(|_| false, "NAME=VALUE, such as size=32")),
    ("name", Text),
    ("size", Whole(1, ANY)),
]);

pub(super) const HOSTPCI: Kind = Properties(&[
    ("host", Form(is_pci, "a PCI address such as 0000:01:00.0")),
    ("device-id", Text),
    ("driver", OneOf(&["keep", "vfio"])),
    ("legacy-igd", Bool),
    ("mapping", Text),
    ("mdev", Text),
    ("pcie", Bool),
    ("rombar", Bool),
    ("romfile", Text),
    ("sub-device-id", Text),
    ("sub-vendor-id", Text),
    ("vendor-id", Text),
    ("x-vga", Bool),
]);

pub(super) const USB: Kind = Properties(&[
    ("host", Form(is_usb, "spice, VENDOR:PRODUCT or BUS-PORT")),
    ("mapping", Text),
    ("usb3", Bool),
]);

pub(super) const NUMA: Kind = Properties(&[
    ("", Form(|_| false, "NAME=VALUE, such as cpus=0-1,memory=1024")),
    ("cpus", Form(is_id_list, "numbers and ranges such as 0-1;4")),
    ("hostnodes", Form(is_id_list, "numbers and ranges such as 0-1")),
    ("memory", Whole(0, ANY)),
    ("policy", OneOf(&["bind", "interleave", "preferred"])),
]);

pub(super) const SPICE: Kind = Properties(&[
    ("", Form(|_| false, "NAME=VALUE, such as videostreaming=all")),
    ("foldersharing", Bool),
    ("videostreaming", OneOf(&["all", "filter", "off"])),
]);

pub(super) const BOOT: Kind = Form(is_boot, "order=DRIVE;DRIVE… of drives, net, usb and hostpci devices");
pub(super) const BOOT_DISK: Kind = Form(is_bootable, "a drive such as scsi0");
pub(super) const HOTPLUG: Kind =
    Form(is_hotplug, "0, 1 or a list of network, disk, usb, cpu, memory, cloudinit");
pub(super) const SERIAL: Kind =
    Form(|text| text == "socket" || text.len() > 5 && text.starts_with("/dev/"), "socket or a device");
pub(super) const PARALLEL: Kind = Form(
    |text| text.starts_with("/dev/parport") || text.starts_with("/dev/usb/lp"),
    "a device such as /dev/parport0",
);
pub(super) const START_DATE: Kind = Form(is_date, "now, YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS");
pub(super) const GENERATION: Kind =
    Form(|text| text == "0" || text == "1" || is_uuid(text), "a UUID, 0 or 1");
pub(super) const AFFINITY: Kind = Form(is_cpu_list, "numbers and ranges of CPUs such as 0,5,8-11");

/// First parts of the names of QEMU's CPU models. The list of names is longer in each version.
const CPU_FAMILIES: &[&str] = &[
    "486",
    "Broadwell",
    "Cascadelake",
    "ClearwaterForest",
    "Conroe",
    "Cooperlake",
    "Denverton",
    "Dhyana",
    "DiamondRapids",
    "EPYC",
    "GraniteRapids",
    "Haswell",
    "Icelake",
    "IvyBridge",
    "KnightsMill",
    "Nehalem",
    "Opteron_G",
    "Penryn",
    "SandyBridge",
    "SapphireRapids",
    "SierraForest",
    "Skylake",
    "Snowridge",
    "Westmere",
    "YongFeng",
    "a64fx",
    "athlon",
    "core2duo",
    "coreduo",
    "cortex-",
    "custom-",
    "host",
    "kvm32",
    "kvm64",
    "max",
    "n270",
    "neoverse-",
    "pentium",
    "phenom",
    "qemu32",
    "qemu64",
    "x86-64-v",
];

fn is_cpu(text: &str) -> bool {
    let is_name = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    is_name && CPU_FAMILIES.iter().any(|family| text.starts_with(family))
}

fn is_phys_bits(text: &str) -> bool {
    text == "host" || text.parse::<u8>().is_ok_and(|bits| (8..=64).contains(&bits))
}

fn is_machine(text: &str) -> bool {
    // A version of QEMU, perhaps with a revision of Proxmox VE: `9.0+pve1`, `2.9.pxe`.
    let is_version = |text: &str| {
        let text = text.strip_suffix(".pxe").unwrap_or(text);
        let (version, revision) = text.split_once("+pve").unwrap_or((text, "0"));
        version.contains('.') && version.split('.').all(is_number) && is_number(revision)
    };
    let fronts = ["pc-q35-", "pc-i440fx-", "pc-", "virt-"];
    matches!(text, "pc" | "q35" | "virt")
        || fronts.iter().any(|front| text.strip_prefix(front).is_some_and(is_version))
}

fn is_number(text: &str) -> bool {
    text.parse::<u32>().is_ok() && !text.starts_with('+')
}

/// True for a number or `FIRST-LAST`.
fn is_range(text: &str) -> bool {
    match text.split_once('-') {
        Some((first, last)) => is_number(first) && is_number(last),
        None => is_number(text),
    }
}

fn is_id_list(text: &str) -> bool {
    text.split(';').all(is_range)
}

fn is_cpu_list(text: &str) -> bool {
    text.split(',').all(is_range)
}

fn is_boot(text: &str) -> bool {
    let Some(order) = text.strip_prefix("order=") else {
        let letters = text.strip_prefix("legacy=").unwrap_or(text);
        return (1..=4).contains(&letters.len()) && letters.chars().all(|c| "acdn".contains(c));
    };
    let has_number = |name: &str, front: &str| name.strip_prefix(front).is_some_and(is_number);
    order.split(';').all(|name| {
        bus_of(name).is_some() && is_bootable(name)
            || ["net", "usb", "hostpci"].iter().any(|front| has_number(name, front))
    })
}

fn is_hotplug(text: &str) -> bool {
    let devices = ["network", "disk", "cpu", "memory", "usb", "cloudinit"];
    matches!(text, "0" | "1") || text.split(',').all(|name| devices.contains(&name))
}

/// True for digits in the places of `pattern` that have a 0, and else its characters.
fn has_pattern(text: &str, pattern: &str) -> bool {
    let fits = |(c, wanted): (char, char)| if wanted == '0' { c.is_ascii_digit() } else { c == wanted };
    text.chars().count() == pattern.len() && text.chars().zip(pattern.chars()).all(fits)
}

fn is_date(text: &str) -> bool {
    text == "now" || has_pattern(text, "0000-00-00") || has_pattern(text, "0000-00-00T00:00:00")
}

fn is_hex(text: &str, least: usize, most: usize) -> bool {
    (least..=most).contains(&text.len()) && text.chars().all(|c| c.is_ascii_hexdigit())
}

fn is_uuid(text: &str) -> bool {
    let lengths = [8, 4, 4, 4, 12];
    let parts: Vec<&str> = text.split('-').collect();
    parts.len() == lengths.len() && parts.iter().zip(lengths).all(|(part, len)| is_hex(part, len, len))
}

fn is_network(text: &str, most: u8, is_address: impl Fn(&str) -> bool) -> bool {
    text.split_once('/').is_some_and(|(address, bits)| {
        is_address(address) && bits.parse::<u8>().is_ok_and(|bits| bits <= most)
    })
}

fn is_ip(text: &str) -> bool {
    text == "dhcp" || is_network(text, 32, |text| text.parse::<std::net::Ipv4Addr>().is_ok())
}

fn is_ip6(text: &str) -> bool {
    let is_address = |text: &str| text.parse::<std::net::Ipv6Addr>().is_ok();
    matches!(text, "auto" | "dhcp") || is_network(text, 128, is_address)
}

/// True for PCI addresses `DOMAIN:BUS:DEVICE.FUNCTION`, with a domain and a function or without.
fn is_pci(text: &str) -> bool {
    text.split(';').all(|address| {
        let (slot, function) = address.split_once('.').unwrap_or((address, "0"));
        let parts: Vec<&str> = slot.split(':').collect();
        let is_slot = match *parts {
            [bus, device] => is_hex(bus, 2, 2) && is_hex(device, 2, 2),
            [domain, bus, device] => is_hex(domain, 4, 8) && is_hex(bus, 2, 2) && is_hex(device, 2, 2),
            _ => false,
        };
        is_slot && is_hex(function, 1, 1)
    })
}

fn is_usb(text: &str) -> bool {
    let id = |text: &str| is_hex(text.trim_start_matches("0x"), 4, 4);
    let is_id = text.split_once(':').is_some_and(|(vendor, product)| id(vendor) && id(product));
    let is_port =
        text.split_once('-').is_some_and(|(bus, port)| is_number(bus) && port.split('.').all(is_number));
    is_id || is_port || text.eq_ignore_ascii_case("spice")
}

#[cfg(test)]
mod tests {
    use super::super::check;

    #[test]
    fn values_with_a_form_of_their_own() {
        for (key, good, bad) in [
            ("cpu", "x86-64-v2-AES,flags=+aes;-pcid", "bogus"),
            ("cpu", "cputype=host,hidden=1", "host,hidden=x"),
            ("vga", "virtio,memory=64", "none,memory=1"),
            ("keyboard", "de-ch", "xx"),
            ("machine", "pc-q35-9.0+pve1,viommu=intel", "bogus"),
            ("machine", "pc-i440fx-5.1", "pc-q35-x"),
            ("serial0", "socket", "x"),
            ("parallel0", "/dev/parport0", "x"),
            ("watchdog", "i6300esb,action=reset", "foo"),
            ("audio0", "device=ich9-intel-hda,driver=spice", "device=foo"),
            ("boot", "order=scsi0;ide2;net0", "order=foo0"),
            ("boot", "cdn", "bogus"),
            ("hotplug", "network,disk,usb", "bogus"),
            ("startup", "order=1,up=30", "x"),
            ("startdate", "2026-01-31T12:00:00", "x"),
            ("vmgenid", "01234567-89ab-cdef-0123-456789abcdef", "x"),
            ("smbios1", "uuid=01234567-89ab-cdef-0123-456789abcdef,base64=1", "uuid=x"),
            ("smbios1", "serial=MQ==", "foo=1"),
            ("ipconfig0", "ip=10.0.0.5/24,gw=10.0.0.1,ip6=auto", "ip=foo"),
            ("rng0", "source=/dev/urandom,max_bytes=1024", "x"),
            ("affinity", "0,5,8-11", "abc"),
            ("cpuunits", "1024", "0"),
            ("hostpci0", "0000:01:00.0,pcie=1", "zz"),
            ("hostpci1", "mapping=gpu", "01:00.0,pcie=2"),
            ("usb0", "host=1234:abcd,usb3=1", "foo"),
            ("usb1", "spice", "host=1:2"),
            ("ivshmem", "size=32", "size=1x"),
            ("bootdisk", "virtio0", "foo"),
            ("numa0", "cpus=0-1;4,memory=1024", "cpus=x"),
            ("spice_enhancements", "foldersharing=1", "foldersharing=x"),
        ] {
            assert_eq!(check(key, good), Ok(()), "{key}={good}");
            assert!(check(key, bad).is_err(), "{key}={bad}");
        }
    }
}
