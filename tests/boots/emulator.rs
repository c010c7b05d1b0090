//! A machine emulated by QEMU, as the XML of a domain describes it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use imgtool_testing::{oracles, text};

/// Maximum duration of a boot. Our limit: it takes 10 s of a processor, and tests may share it with many
/// programs.
const PATIENCE: Duration = Duration::from_secs(600);

/// Firmware of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF.
    Uefi,
}

impl Firmware {
    /// Returns the name that the guest has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
        }
    }
}

/// A machine with one disk.
#[derive(Debug)]
pub struct Emulated {
    q35: bool,
    firmware: Firmware,
    image: PathBuf,
    format: String,
    /// Arguments of QEMU for the controller and the disk `d`.
    devices: Vec<String>,
}

impl Emulated {
    /// Describes a machine with an image on a bus.
    pub fn image(image: &Path, format: &str, bus: &str, firmware: Firmware) -> Self {
        let devices = match bus {
            "virtio" => vec!["virtio-blk-pci,drive=d".to_owned()],
            "sata" => vec!["ahci,id=sata0".to_owned(), "ide-hd,drive=d,bus=sata0.0".to_owned()],
            _ => vec!["ide-hd,drive=d,bus=ide.0,unit=0".to_owned()],
        };
        Self { q35: false, firmware, image: image.to_owned(), format: format.to_owned(), devices }
    }

    /// Reads the XML of a domain. Its disk has the place that libvirt gives it.
    pub fn domain(path: &Path) -> Self {
        let domain = std::fs::read_to_string(path).unwrap();
        let line = |tag: &str| domain.lines().find(|line| line.trim_start().starts_with(tag));
        let source = line("<source file=").expect("a disk");
        let driver = line("<driver ").expect("a format");
        let bus = attribute(line("<target dev=").expect("a target"), "bus");
        let q35 = domain.contains("machine='q35'");
        let uefi = domain.contains("<os firmware='efi'>");
        let mut controllers = domain.lines().filter(|line| line.contains("<controller type='scsi'"));
        let place = |name| line("<address type='drive'").map_or("0", |line| attribute(line, name));
        let model = controllers.find(|line| attribute(line, "index") == place("controller"));
        let model = model.map(|line| attribute(line, "model"));
        let devices = match (bus, q35) {
            ("virtio", _) => vec!["virtio-blk-pci,drive=d".to_owned()],
            ("scsi", _) => scsi(model.expect("a controller"), place("target"), place("unit")),
            // The first controller of Q35 is a part of it.
            ("sata", true) => vec![format!("ide-hd,drive=d,bus=ide.{}", place("unit"))],
            ("sata", false) => {
                vec!["ahci,id=sata0".to_owned(), format!("ide-hd,drive=d,bus=sata0.{}", place("unit"))]
            }
            ("ide", false) => {
                vec![format!("ide-hd,drive=d,bus=ide.{},unit={}", place("bus"), place("unit"))]
            }
            other => panic!("{other:?}: {domain}"),
        };
        Self {
            q35,
            firmware: if uefi { Firmware::Uefi } else { Firmware::Bios },
            image: attribute(source, "file").into(),
            format: attribute(driver, "type").to_owned(),
            devices,
        }
    }

    /// Boots the machine. Returns the line that its guest prints.
    pub fn boot(&self, directory: &Path) -> String {
        let serial = directory.join("serial");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "std"]);
        // GRUB for UEFI needs more than 256 MiB for a kernel.
        command.args(["-accel", "tcg", "-m", "512", "-machine", if self.q35 { "q35" } else { "pc" }]);
        command.args(["-serial", &format!("file:{}", text(&serial))]);
        if self.firmware == Firmware::Uefi {
            let [code, state] = oracles::ovmf();
            let own = directory.join("firmware");
            std::fs::copy(state, &own).unwrap();
            command.args(["-drive", &format!("if=pflash,format=raw,readonly=on,file={}", text(&code))]);
            command.args(["-drive", &format!("if=pflash,format=raw,file={}", text(&own))]);
        }
        // A stream-optimized VMDK is not written to.
        let image = format!("if=none,id=d,snapshot=on,format={},file={}", self.format, text(&self.image));
        command.args(["-drive", &image]);
        for (last, device) in self.devices.iter().rev().enumerate().rev() {
            command
                .args(["-device", &if last == 0 { format!("{device},bootindex=1") } else { device.clone() }]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        wait(child.unwrap_or_else(|e| panic!("{command:?}: {e}")), &serial, &format!("{command:?}"))
    }
}

/// Returns the arguments for a SCSI disk. libvirt's `unit` is the SCSI number of LSI Logic; for all others,
/// `target` is that number and `unit` the LUN.
fn scsi(model: &str, target: &str, unit: &str) -> Vec<String> {
    let (controller, number, lun) = match model {
        "virtio-scsi" => ("virtio-scsi-pci", target, unit),
        "lsilogic" => ("lsi53c895a", unit, "0"),
        "lsisas1068" => ("mptsas1068", target, unit),
        "lsisas1078" => ("megasas", target, unit),
        "vmpvscsi" => ("pvscsi", target, unit),
        other => panic!("the controller {other}"),
    };
    vec![format!("{controller},id=scsi0"), format!("scsi-hd,drive=d,bus=scsi0.0,scsi-id={number},lun={lun}")]
}

/// Waits until the guest has turned the machine off. Ends QEMU otherwise.
fn wait(mut child: std::process::Child, serial: &Path, command: &str) -> String {
    let began = Instant::now();
    let status = loop {
        match child.try_wait().expect("wait") {
            Some(status) => break Some(status),
            None if began.elapsed() > PATIENCE => {
                child.kill().expect("kill");
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let output = child.wait_with_output().expect("output");
    let console = String::from_utf8_lossy(&std::fs::read(serial).unwrap_or_default()).into_owned();
    let line = console.lines().find_map(|line| line.split_once("GUEST: "));
    let Some((_, line)) = line.filter(|_| status.is_some_and(|status| status.success())) else {
        let mut shown = String::new();
        let _ = write!(shown, "{status:?} after {:?}\n{console}", began.elapsed());
        panic!("{command}: {shown}\n{}", String::from_utf8_lossy(&output.stderr));
    };
    line.trim_end().to_owned()
}

/// Returns the value of an attribute.
fn attribute<'l>(line: &'l str, name: &str) -> &'l str {
    let (_, rest) = line.split_once(&format!(" {name}='")).unwrap_or_else(|| panic!("no {name}: {line}"));
    rest.split_once('\'').expect("a quote").0
}
