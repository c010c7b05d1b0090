//! The rules of all platforms, as data: one table for the choice of a new image and for the check of a
//! finished one.

use crate::platform::Generation;

/// Rules of a platform.
#[derive(Debug)]
pub struct Rules {
    /// Name that users state.
    pub name: &'static str,
    /// Name for people.
    pub title: &'static str,
    /// True if the generation of the machine can be stated: `hyperv:gen2`.
    pub has_generations: bool,
    /// Forms of an image that the platform takes. The first one for each purpose is the default.
    pub forms: &'static [Form],
    /// True if the platform takes firmware variables and the state of a TPM from elsewhere.
    pub takes_state: bool,
    /// Maximum number of disks of a machine.
    pub max_disks: Option<usize>,
    /// What a disk that starts with UEFI alone needs there, if the user has to do something about it.
    pub uefi_only: Option<&'static str>,
    /// What a disk that starts with a BIOS alone needs there.
    pub bios_only: Option<&'static str>,
    /// What a guest of Windows needs there, if it is not a part of Windows.
    pub windows: Option<&'static str>,
}

/// What an image is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// One disk.
    Disk,
    /// The disks of a machine, with its description.
    Machine,
}

/// A form of an image that a platform takes.
#[derive(Debug)]
pub struct Form {
    /// Name of the format.
    pub format: &'static str,
    /// Purpose.
    pub purpose: Purpose,
    /// Compressions of the whole file that the platform undoes. The first one is the default.
    pub compressions: &'static [Option<&'static str>],
    /// Ends of the file's name, each from its first dot on; none if the platform doesn't care.
    pub extensions: &'static [&'static str],
    /// Shape of the name before that: `#` stands for a number, `0` for a digit.
    pub stem: Option<&'static str>,
    /// Options of the format for a new image.
    pub options: &'static [Choice],
    /// Facts that an image must have.
    pub facts: &'static [FactRule],
    /// Sizes of its disks.
    pub size: SizeRule,
    /// Generation of the machines that take this form; `None` for all.
    pub generation: Option<Generation>,
    /// Where the rules come from.
    pub source: &'static str,
}

/// An option of the format for a new image.
#[derive(Debug)]
pub struct Choice {
    /// Key.
    pub key: &'static str,
    /// Value if the user states none.
    pub value: &'static str,
    /// Values that the platform takes as well.
    pub others: &'static [&'static str],
}

/// A fact that an image must have.
#[derive(Debug, Clone, Copy)]
pub struct FactRule {
    /// Key of the fact.
    pub key: &'static str,
    /// Name of the rule.
    pub rule: &'static str,
    /// Values that the platform takes.
    pub values: Values,
    /// What to do about another value.
    pub advice: &'static str,
    /// True if the platform refuses other values; otherwise they have a disadvantage.
    pub is_strict: bool,
}

/// Values of a fact.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// One of these. Of a list of values, all.
    OneOf(&'static [&'static str]),
    /// Words that begin so, at least one of them.
    Begins(&'static str),
}

/// Sizes of disks that a platform takes.
#[derive(Debug)]
pub struct SizeRule {
    /// Multiple in bytes.
    pub multiple: u64,
    /// Minimum in bytes.
    pub min: u64,
    /// Maximum in bytes.
    pub max: u64,
    /// True if the platform refuses other multiples; otherwise some programs have a problem with them.
    pub is_strict: bool,
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const ANY_SIZE: SizeRule = SizeRule { multiple: 1, min: 0, max: u64::MAX, is_strict: true };
const WHOLE_SECTORS: SizeRule = SizeRule { multiple: 512, min: 0, max: u64::MAX, is_strict: true };

/// vmdk-convert of open-vmdk never ends if the last grain is incomplete; VirtualBox rounds up.
const WHOLE_GRAINS: SizeRule = SizeRule { multiple: 64 << 10, min: 0, max: 62 * TIB, is_strict: false };

/// Form with nothing special, from which the others differ.
const PLAIN: Form = Form {
    format: "raw",
    purpose: Purpose::Disk,
    compressions: &[None],
    extensions: &[],
    stem: None,
    options: &[],
    facts: &[],
    size: ANY_SIZE,
    generation: None,
    source: "",
};

const STREAM_OPTIMIZED: Choice = Choice { key: "subformat", value: "streamOptimized", others: &[] };

const IS_STREAM_OPTIMIZED: FactRule = FactRule {
    key: "create-type",
    rule: "variant",
    values: Values::OneOf(&["streamOptimized"]),
    advice: "make it a streamOptimized VMDK",
    is_strict: true,
};

const HOLDS_STREAMS: [FactRule; 2] = [
    FactRule {
        key: "disk-formats",
        rule: "disks",
        values: Values::OneOf(&["vmdk", "empty"]),
        advice: "make the disks streamOptimized VMDK",
        is_strict: true,
    },
    FactRule {
        key: "disk-variants",
        rule: "disks",
        values: Values::OneOf(&["streamOptimized", "empty"]),
        advice: "make the disks streamOptimized VMDK",
        is_strict: true,
    },
];

const QCOW2: Form = Form { format: "qcow2", extensions: &[".qcow2", ".img"], ..PLAIN };
const RAW: Form = Form { extensions: &[".raw", ".img"], ..PLAIN };
const OVA: Form = Form {
    format: "ova",
    purpose: Purpose::Machine,
    extensions: &[".ova", ".ovf"],
    facts: &HOLDS_STREAMS,
    size: WHOLE_GRAINS,
    ..PLAIN
};

/// Drivers of virtio, which Windows has none of.
const VIRTIO: &str = "install the virtio drivers (viostor or vioscsi, NetKVM) in the guest first, or give the \
                      disk a SATA controller until then";

/// The rules of all platforms.
pub const RULES: &[Rules] = &[
    Rules {
        name: "proxmox",
        title: "Proxmox VE",
        has_generations: false,
        forms: &[
            Form { source: "qm(1), importdisk", ..QCOW2 },
            Form {
                format: "vma",
                purpose: Purpose::Machine,
                compressions: &[Some("zstd"), Some("gzip"), Some("lzop"), None],
                extensions: &[".vma.zst", ".vma.gz", ".vma.lzo", ".vma"],
                stem: Some("vzdump-qemu-#-0000_00_00-00_00_00"),
                source: "qmrestore(1)",
                ..PLAIN
            },
            Form { source: "qm(1), importdisk", ..RAW },
            Form {
                format: "vmdk",
                extensions: &[".vmdk"],
                // It refuses an untrusted VMDK of several extents.
                facts: &[FactRule {
                    key: "create-type",
                    rule: "variant",
                    values: Values::OneOf(&["monolithicSparse", "streamOptimized"]),
                    advice: "make it a VMDK of one file, or qcow2",
                    is_strict: true,
                }],
                options: &[Choice {
                    key: "subformat",
                    value: "streamOptimized",
                    others: &["monolithicSparse"],
                }],
                source: "storage import of Proxmox VE",
                ..PLAIN
            },
            Form { facts: &[], size: ANY_SIZE, source: "storage import of Proxmox VE", ..OVA },
        ],
        takes_state: true,
        max_disks: None,
        uefi_only: Some("choose the BIOS OVMF (UEFI), with an EFI disk"),
        bios_only: None,
        windows: Some(VIRTIO),
    },
    Rules {
        name: "libvirt",
        title: "libvirt with QEMU and KVM",
        has_generations: false,
        forms: &[
            Form { source: "libvirt, domain XML", ..QCOW2 },
            Form { source: "libvirt, domain XML", ..RAW },
        ],
        takes_state: true,
        max_disks: None,
        uefi_only: Some("choose UEFI firmware (OVMF) for the domain"),
        bios_only: None,
        windows: Some(VIRTIO),
    },
    Rules {
        name: "hyperv",
        title: "Microsoft Hyper-V",
        has_generations: true,
        forms: &[
            Form {
                format: "vhdx",
                extensions: &[".vhdx"],
                options: &[
                    Choice { key: "subformat", value: "dynamic", others: &["fixed"] },
                    Choice { key: "logical_sector_size", value: "512", others: &["4096", "4k", "4K"] },
                    Choice { key: "physical_sector_size", value: "4096", others: &["512"] },
                ],
                facts: &[
                    FactRule {
                        key: "subformat",
                        rule: "variant",
                        values: Values::OneOf(&["dynamic", "fixed"]),
                        advice: "merge it with its parent: convert it",
                        is_strict: true,
                    },
                    FactRule {
                        key: "logical-sector-size",
                        rule: "sectors",
                        values: Values::OneOf(&["512"]),
                        advice: "most guests start from sectors of 512 bytes alone",
                        is_strict: false,
                    },
                    FactRule {
                        key: "physical-sector-size",
                        rule: "sectors",
                        values: Values::OneOf(&["4096"]),
                        advice: "4096 lets the guest align its writes to the blocks of the file",
                        is_strict: false,
                    },
                ],
                size: SizeRule { multiple: MIB, min: 0, max: 64 * TIB, is_strict: true },
                source: "MS-VHDX 2.6",
                ..PLAIN
            },
            Form {
                format: "vhd",
                extensions: &[".vhd"],
                options: &[Choice { key: "subformat", value: "dynamic", others: &["fixed"] }],
                facts: &[FactRule {
                    key: "subformat",
                    rule: "variant",
                    values: Values::OneOf(&["dynamic", "fixed"]),
                    advice: "merge it with its parent: convert it",
                    is_strict: true,
                }],
                size: SizeRule { multiple: MIB, min: 0, max: 2040 * GIB, is_strict: true },
                generation: Some(Generation::One),
                source: "machines of generation 2 take VHDX alone",
                ..PLAIN
            },
        ],
        takes_state: false,
        max_disks: None,
        uefi_only: Some("make a machine of generation 2"),
        bios_only: Some("make a machine of generation 1"),
        windows: None,
    },
    Rules {
        name: "azure",
        title: "Microsoft Azure",
        has_generations: true,
        forms: &[Form {
            format: "vhd",
            extensions: &[".vhd"],
            options: &[
                Choice { key: "subformat", value: "fixed", others: &[] },
                Choice { key: "align", value: "1M", others: &["1m", "1048576"] },
            ],
            facts: &[FactRule {
                key: "subformat",
                rule: "variant",
                values: Values::OneOf(&["fixed"]),
                advice: "make it a fixed VHD: Azure refuses dynamic and differencing ones",
                is_strict: true,
            }],
            // The upload takes 20 MiB to 32 TiB, and the footer.
            size: SizeRule { multiple: MIB, min: 20 * MIB, max: 32 * TIB, is_strict: true },
            source: "Azure Compute REST API, uploadSizeBytes; Add-AzVhd",
            ..PLAIN
        }],
        takes_state: false,
        max_disks: None,
        uefi_only: Some("upload it with the generation V2"),
        bios_only: Some("upload it with the generation V1"),
        windows: None,
    },
    Rules {
        name: "aws",
        title: "Amazon EC2 (VM Import/Export)",
        has_generations: false,
        forms: &[
            Form {
                format: "vmdk",
                extensions: &[".vmdk"],
                options: &[STREAM_OPTIMIZED],
                facts: &[IS_STREAM_OPTIMIZED],
                size: WHOLE_GRAINS,
                source: AWS,
                ..PLAIN
            },
            Form { source: AWS, ..OVA },
            Form {
                format: "vhd",
                extensions: &[".vhd"],
                options: &[Choice { key: "subformat", value: "dynamic", others: &["fixed"] }],
                facts: &[NO_DIFFERENCES],
                size: WHOLE_SECTORS,
                source: AWS,
                ..PLAIN
            },
            Form {
                format: "vhdx",
                extensions: &[".vhdx"],
                options: &[Choice { key: "subformat", value: "dynamic", others: &["fixed"] }],
                facts: &[NO_DIFFERENCES],
                size: WHOLE_SECTORS,
                source: AWS,
                ..PLAIN
            },
            Form { size: WHOLE_SECTORS, source: AWS, ..RAW },
        ],
        takes_state: false,
        max_disks: Some(21),
        uefi_only: Some("import it with the boot mode uefi"),
        bios_only: None,
        windows: Some("the import adds Amazon's drivers only to the versions of Windows that it knows"),
    },
    Rules {
        name: "gce",
        title: "Google Compute Engine",
        has_generations: false,
        forms: &[Form {
            format: "tar",
            compressions: &[Some("gzip")],
            extensions: &[".tar.gz"],
            facts: &[
                FactRule {
                    key: "tar-format",
                    rule: "variant",
                    values: Values::OneOf(&["oldgnu"]),
                    advice: "make the archive with tar --format=oldgnu",
                    is_strict: true,
                },
                FactRule {
                    key: "files",
                    rule: "disk-name",
                    values: Values::OneOf(&["disk.raw"]),
                    advice: "the archive must hold one file, called disk.raw",
                    is_strict: true,
                },
            ],
            size: SizeRule { multiple: GIB, min: GIB, max: u64::MAX, is_strict: true },
            source: "Compute Engine, manual import of boot disks",
            ..PLAIN
        }],
        takes_state: false,
        max_disks: Some(1),
        uefi_only: Some("create the image with the guest OS feature UEFI_COMPATIBLE"),
        bios_only: None,
        windows: Some("install Google's virtio drivers in the guest first"),
    },
    Rules {
        name: "vmware",
        title: "VMware vSphere and ESXi",
        has_generations: false,
        forms: &[
            Form {
                format: "vmdk",
                extensions: &[".vmdk"],
                options: &[Choice { key: "subformat", value: "streamOptimized", others: &["vmfs"] }],
                facts: &[FactRule {
                    key: "create-type",
                    rule: "variant",
                    values: Values::OneOf(&["streamOptimized", "vmfs"]),
                    advice: "make it streamOptimized for an import, or vmfs for a datastore of ESXi",
                    is_strict: true,
                }],
                size: WHOLE_GRAINS,
                source: "ESXi 6.5 and newer start no monolithicSparse disk",
                ..PLAIN
            },
            Form {
                facts: &[
                    FactRule {
                        key: "system-type",
                        rule: "hardware",
                        values: Values::Begins("vmx-"),
                        advice: "ESXi refuses other systems than vmx-N: convert the package",
                        is_strict: true,
                    },
                    HOLDS_STREAMS[0],
                    HOLDS_STREAMS[1],
                ],
                source: "ovftool, open-vmdk",
                ..OVA
            },
        ],
        takes_state: false,
        max_disks: None,
        uefi_only: Some("set the firmware of the machine to EFI"),
        bios_only: None,
        windows: None,
    },
    Rules {
        name: "virtualbox",
        title: "Oracle VirtualBox",
        has_generations: false,
        forms: &[
            Form { format: "vdi", extensions: &[".vdi"], facts: &[WHOLE_VDI], source: VBOX, ..PLAIN },
            Form { source: VBOX, ..OVA },
            Form {
                format: "vmdk",
                extensions: &[".vmdk"],
                options: &[Choice {
                    key: "subformat",
                    value: "monolithicSparse",
                    others: &[
                        "streamOptimized",
                        "monolithicFlat",
                        "twoGbMaxExtentSparse",
                        "twoGbMaxExtentFlat",
                    ],
                }],
                facts: &[FactRule {
                    key: "create-type",
                    rule: "variant",
                    values: Values::OneOf(&[
                        "streamOptimized",
                        "monolithicSparse",
                        "monolithicFlat",
                        "twoGbMaxExtentSparse",
                        "twoGbMaxExtentFlat",
                    ]),
                    advice: "VirtualBox reads no COWD, SE sparse or VMFS disks: convert it",
                    is_strict: true,
                }],
                source: VBOX,
                ..PLAIN
            },
            Form { format: "vhd", extensions: &[".vhd"], size: WHOLE_SECTORS, source: VBOX, ..PLAIN },
        ],
        takes_state: false,
        max_disks: None,
        uefi_only: Some("switch EFI on in the machine's settings: an import does not"),
        bios_only: None,
        windows: None,
    },
    Rules {
        name: "openstack",
        title: "OpenStack (Glance)",
        has_generations: false,
        forms: &[
            Form { source: "Glance, disk formats; CVE-2024-32498", ..QCOW2 },
            Form { source: "Glance, disk formats", ..RAW },
        ],
        takes_state: false,
        max_disks: None,
        uefi_only: Some("set the image property hw_firmware_type=uefi"),
        bios_only: None,
        windows: Some(VIRTIO),
    },
];

const AWS: &str = "VM Import/Export User Guide, image formats and limitations";
const VBOX: &str = "VirtualBox 7.0, storage and OVF import";

const NO_DIFFERENCES: FactRule = FactRule {
    key: "subformat",
    rule: "variant",
    values: Values::OneOf(&["dynamic", "fixed"]),
    advice: "merge it with its parent: convert it",
    is_strict: true,
};

const WHOLE_VDI: FactRule = FactRule {
    key: "version",
    rule: "variant",
    values: Values::OneOf(&["1.1"]),
    advice: "convert it to a VDI of version 1.1",
    is_strict: true,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_platform_takes_a_disk_and_names_its_sources() {
        for rules in RULES {
            assert!(rules.forms.iter().any(|form| form.purpose == Purpose::Disk), "{}", rules.name);
            for form in rules.forms {
                assert!(!form.source.is_empty(), "{} {}", rules.name, form.format);
                assert!(form.size.multiple > 0 && form.size.min.is_multiple_of(form.size.multiple));
                assert!(!form.compressions.is_empty());
            }
        }
    }
}
