//! Facts about the guest of an archive, from its Proxmox configuration.

use std::collections::BTreeMap;

use imgtool_core::Attachment;
use imgtool_core::machine::{Firmware, Machine, Nic};

use crate::proxmox;

/// Maximum length in bytes of a configuration to parse. Our limit: real ones are a page of text.
const MAX_LEN: usize = 1 << 20;

/// Summarises the guest ("web, 4 cores, 8192 MiB memory, ostype l26"). Omits missing settings and a malformed
/// number of cores; returns `None` if nothing remains.
pub fn summary(attachments: &[Attachment]) -> Option<String> {
    let settings = settings(attachments)?;
    let get = |key: &str| settings.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let mut parts: Vec<String> = get("name").map(str::to_owned).into_iter().collect();
    let number = |key| get(key).map_or(Some(1), |text| text.parse::<u64>().ok());
    if let (true, Some(cores)) = (
        get("cores").is_some() || get("sockets").is_some(),
        number("cores").zip(number("sockets")).and_then(|(cores, sockets)| cores.checked_mul(sockets)),
    ) {
        parts.push(format!("{cores} {}", if cores == 1 { "core" } else { "cores" }));
    }
    // The value is either "8192" or "current=8192".
    if let Some(memory) = get("memory") {
        parts.push(format!("{} MiB memory", memory.strip_prefix("current=").unwrap_or(memory)));
    }
    parts.extend(get("bios").filter(|bios| *bios == "ovmf").map(|_| "UEFI".to_owned()));
    parts.extend(get("ostype").map(|kind| format!("ostype {kind}")));
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Summarises a machine that another dialect describes, in the same form.
pub fn of_machine(machine: &Machine) -> String {
    let mut parts: Vec<String> = Vec::new();
    parts.extend((!machine.name.is_empty()).then(|| machine.name.clone()));
    let cores = machine.cpu.count();
    parts.push(format!("{cores} {}", if cores == 1 { "core" } else { "cores" }));
    parts.extend(machine.memory.map(|bytes| format!("{} MiB memory", bytes >> 20)));
    parts.extend((machine.firmware == Firmware::Uefi).then(|| "UEFI".to_owned()));
    parts.extend(machine.os.map(|os| os.to_string()));
    parts.join(", ")
}

/// Returns the controllers and the network adapters of a machine, with labels.
pub fn hardware(machine: &Machine) -> Vec<(&'static str, String)> {
    let mut models: Vec<&str> =
        machine.controllers.iter().map(|controller| controller.model.name()).collect();
    models.dedup();
    let adapter = |nic: &Nic| {
        let mac = nic.mac.map(|mac| format!(" {mac}")).unwrap_or_default();
        let network = nic.network.as_ref().map(|network| format!(" on {network}")).unwrap_or_default();
        format!("{}{mac}{network}{}", nic.model, if nic.connected { "" } else { ", unplugged" })
    };
    let adapters: Vec<String> = machine.nics.iter().map(adapter).collect();
    let firmware: Vec<String> = (machine.secure_boot.then(|| "secure boot".to_owned()).into_iter())
        .chain(machine.tpm.map(|tpm| format!("TPM {tpm}")))
        .collect();
    let lines = [
        ("controllers", models.join(", ")),
        ("network", adapters.join("; ")),
        ("security", firmware.join(", ")),
    ];
    lines.into_iter().filter(|(_, value)| !value.is_empty()).collect()
}

/// Maps the name of each device in the archive to the drive that a restore creates and the storage of the
/// original drive ("scsi0 (was on local-lvm)").
pub fn drives(attachments: &[Attachment]) -> BTreeMap<String, String> {
    let Some(text) = text(attachments) else { return BTreeMap::new() };
    let maps = text.lines().filter_map(|line| line.strip_prefix("#qmdump#map:"));
    maps.filter_map(|line| {
        let mut fields = line.split(':');
        let (drive, device) = (fields.next()?, fields.next()?);
        let storage = fields.next().filter(|storage| !storage.is_empty());
        let origin = storage.map(|storage| format!(" (was on {storage})")).unwrap_or_default();
        Some((device.to_owned(), format!("{drive}{origin}")))
    })
    .collect()
}

fn text(attachments: &[Attachment]) -> Option<&str> {
    let config = attachments.iter().find(|attachment| attachment.name == proxmox::CONFIG_NAME)?;
    if config.data.len() > MAX_LEN {
        return None;
    }
    std::str::from_utf8(&config.data).ok()
}

/// Returns the current settings of the guest, without the sections of its snapshots, which come after them.
fn settings(attachments: &[Attachment]) -> Option<BTreeMap<String, String>> {
    let lines = text(attachments)?.lines().take_while(|line| !line.starts_with('['));
    let pairs = lines.filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(':'));
    Some(pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Vec<Attachment> {
        vec![Attachment { name: "qemu-server.conf".to_owned(), data: text.as_bytes().to_vec() }]
    }

    #[test]
    fn guest_summary_fits_one_line() {
        let of = |text: &str| summary(&config(text));
        let text =
            "#note\nname: web\ncores: 4\nsockets: 2\nmemory: 8192\nbios: ovmf\nostype: l26\n[s]\nname: old\n";
        assert_eq!(of(text).as_deref(), Some("web, 8 cores, 8192 MiB memory, UEFI, ostype l26"));
        assert_eq!(of("memory: current=512\n").as_deref(), Some("512 MiB memory"));
        assert_eq!(of("cores: many\nname: x\n").as_deref(), Some("x"));
        assert_eq!(of("nothing"), None);
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn reads_drives_from_the_qmdump_map() {
        let map =
            drives(&config("scsi0: x\n#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n#qmdump#map:bad\n"));
        assert_eq!(map.get("drive-scsi0").map(String::as_str), Some("scsi0 (was on local-lvm)"));
        assert_eq!(map.len(), 1);
    }
}
