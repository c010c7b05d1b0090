//! The description of a machine: from an archive to libvirt and to people, from OVF and libvirt into an
//! archive.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::oracles::run;
use imgtool_testing::{fixture, require, tempdir, text};

use crate::support::imgtool;

/// A guest whose configuration tries to reach the host and the directory above.
const HOSTILE: &str = "args: -device evil\nboot: order=scsi0\ncores: 2\nhookscript: local:snippets/evil.pl\n\
    hostpci0: 0000:01:00.0\nmemory: 1024\nname: ../../evil\nnet0: virtio=BC:24:11:00:00:01,bridge=vmbr0\n\
    scsi0: local:105/vm-105-disk-0.raw,size=1G\nscsihw: virtio-scsi-pci\nserial0: /dev/sda\n";

const DESCRIPTOR: &str = r#"<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
 <References><File ovf:href="a.vmdk" ovf:id="f"/></References>
 <DiskSection><Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="1"/></DiskSection>
 <VirtualSystem ovf:id="web"><VirtualHardwareSection>
  <Item><InstanceID>1</InstanceID><ResourceType>3</ResourceType><VirtualQuantity>4</VirtualQuantity></Item>
  <Item><InstanceID>2</InstanceID><ResourceType>4</ResourceType><VirtualQuantity>3072</VirtualQuantity></Item>
  <Item><InstanceID>3</InstanceID><ResourceSubType>VirtualSCSI</ResourceSubType><ResourceType>6</ResourceType></Item>
  <Item><AddressOnParent>2</AddressOnParent><HostResource>ovf:/disk/d</HostResource><InstanceID>4</InstanceID>
   <Parent>3</Parent><ResourceType>17</ResourceType></Item>
  <Item><ElementName>beeper</ElementName><InstanceID>5</InstanceID><ResourceType>35</ResourceType></Item>
 </VirtualHardwareSection></VirtualSystem></Envelope>"#;

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn directory_of_disks_gets_a_domain() {
    let dir = tempdir();
    let archive = fixture("two-disks.vma.zst");
    let report = imgtool(["convert", "--output", "json", text(&archive), "--to", "qcow2", "out/"])
        .within(dir.path())
        .ok()
        .json();
    let notes = report["notes"].to_string();
    assert!(notes.contains("lacks drive-efidisk0: libvirt makes new firmware variables"), "{notes}");
    let files = names(&dir.path().join("out"));
    let name = files.iter().find(|name| name.ends_with(".xml")).unwrap_or_else(|| panic!("{files:?}"));
    assert!(files.contains(&"qemu-server.conf".to_owned()), "{files:?}");
    let path = dir.path().join("out").join(name);
    let domain = std::fs::read_to_string(&path).unwrap();
    let disk = dir.path().canonicalize().unwrap().join("out/drive-scsi0.qcow2");
    let sources = [&disk, &dir.path().join("out/drive-scsi0.qcow2")];
    let has_source = |path: &&Path| domain.contains(&format!("<source file='{}'/>", path.display()));
    assert!(sources.iter().any(|path| has_source(&path.as_path())), "{domain}");
    assert!(domain.contains("<driver name='qemu' type='qcow2'/>"), "{domain}");
    // The same bytes again, and in JSON the machine.
    imgtool(["convert", "-q", text(&archive), "--to", "qcow2", "out/", "--force"]).within(dir.path()).ok();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), domain);
    let info = imgtool(["info", "--output", "json", text(&archive)]).ok().json();
    assert_eq!(info["machine"]["drives"][0]["kind"], "efi-vars", "{info}");
    // Other outputs get none: a single file, and a format that libvirt runs no machine from.
    let one = ["convert", "-q", text(&archive), "--disk", "scsi0", "--to", "qcow2", "one.qcow2"];
    imgtool(one).within(dir.path()).ok();
    imgtool(["convert", "-q", text(&archive), "--to", "vhdx", "vhdx/"]).within(dir.path()).ok();
    assert!(
        names(dir.path()).iter().chain(&names(&dir.path().join("vhdx"))).all(|name| !name.ends_with(".xml"))
    );
}

#[test]
fn paths_in_the_domain_are_plain() {
    let dir = tempdir();
    std::fs::create_dir(dir.path().join("a b")).unwrap();
    let archive = fixture("two-disks.vma.zst");
    imgtool(["convert", "-q", text(&archive), "--to", "qcow2", "../new/"])
        .within(&dir.path().join("a b"))
        .ok();
    let out = dir.path().canonicalize().unwrap().join("new");
    let name = names(&out).into_iter().find(|name| name.ends_with(".xml")).expect("a domain");
    let domain = std::fs::read_to_string(out.join(name)).unwrap();
    let path = out.join("drive-scsi0.qcow2");
    assert!(domain.contains(&format!("<source file='{}'/>", path.display())), "{domain}");
}

#[test]
fn encrypted_disks_get_no_domain_but_a_note() {
    let dir = tempdir();
    std::fs::write(dir.path().join("key"), "secret").unwrap();
    let archive = fixture("two-disks.vma.zst");
    let encrypted = ["--to", "qcow2", "-o", "encrypt=luks", "--target-secret", "file=key", "out/"];
    imgtool(["convert", text(&archive)].iter().chain(&encrypted))
        .within(dir.path())
        .ok()
        .says("no XML for libvirt: disk drive-")
        .says("is encrypted");
    assert!(names(&dir.path().join("out")).iter().all(|name| !name.ends_with(".xml")));
}

#[test]
fn libvirt_takes_the_domain() {
    require!("virt-xml-validate", "xmllint", "virsh");
    let dir = tempdir();
    imgtool(["convert", "-q", text(&fixture("two-disks.vma.zst")), "--to", "qcow2", "out/"])
        .within(dir.path())
        .ok();
    let name =
        names(&dir.path().join("out")).into_iter().find(|name| name.ends_with(".xml")).expect("a domain");
    let path = dir.path().join("out").join(name);
    run("virt-xml-validate", &[text(&path), "domain"]);
    let domain = std::fs::read_to_string(&path).unwrap().replacen("type='kvm'", "type='test'", 1);
    let test = dir.path().join("test.xml");
    std::fs::write(&test, domain).unwrap();
    run("virsh", &["-c", "test:///default", "define", "--validate", text(&test)]);
}

#[test]
fn nothing_of_the_host_is_carried_over() {
    let dir = tempdir();
    Image::hole("d", 1 << 20).with(4096, images::noise(1, 9000)).write_raw(&dir.path().join("a.raw"));
    std::fs::write(dir.path().join("105.conf"), HOSTILE).unwrap();
    std::fs::write(dir.path().join("105.fw"), "[OPTIONS]\nenable: 1\n").unwrap();
    let pack = ["convert", "-q", "a.raw", "--config", "105.conf", "--config", "105.fw", "vm.vma"];
    imgtool(pack).within(dir.path()).ok();
    imgtool(["convert", "vm.vma", "--to", "qcow2", "out/"])
        .within(dir.path())
        .ok()
        .says("lacks args: concerns the host, never carried over")
        .says("lacks hookscript: concerns the host")
        .says("lacks hostpci0: concerns the host")
        .says("lacks serial0: concerns the host")
        .says("name '../../evil'");
    let files = names(&dir.path().join("out"));
    let name = files.iter().find(|name| name.ends_with(".xml")).unwrap_or_else(|| panic!("{files:?}"));
    assert_eq!(files.len(), 4, "{files:?}");
    let domain = std::fs::read_to_string(dir.path().join("out").join(name)).unwrap();
    for word in ["-device", "evil.pl", "0000:01", "/dev/sda", "args"] {
        assert!(!domain.contains(word), "{domain}");
    }
    // The source's own configuration is kept as it is.
    let kept = std::fs::read_to_string(dir.path().join("out/qemu-server.conf")).unwrap();
    assert!(kept.contains("args: -device evil"), "{kept}");
    let page = imgtool(["info", "vm.vma"]).within(dir.path()).ok().text();
    imgtool(["convert", "vm.vma", "vm.ova"])
        .within(dir.path())
        .ok()
        .says("the OVF descriptor lacks args: concerns the host, never carried over")
        .says("'qemu-server.fw' is left out: a package has no place for it");
    for line in ["network: virtio BC:24:11:00:00:01 on vmbr0", "controllers: virtio-scsi"] {
        assert!(page.contains(line), "{line}: {page}");
    }
}

#[test]
fn descriptions_in_xml_become_a_configuration() {
    let dir = tempdir();
    Image::hole("d", 1 << 20).with(4096, images::noise(1, 9000)).write_raw(&dir.path().join("a.raw"));
    std::fs::write(dir.path().join("web.ovf"), DESCRIPTOR).unwrap();
    let convert = |args: &[&str]| imgtool(["convert"]).args(args).within(dir.path()).go();
    let config = |archive: &str| imgtool(["vma", "config", archive]).within(dir.path()).ok().text();
    convert(&["a.raw", "--config", "web.ovf", "--verify", "vm.vma"])
        .exits(0)
        .says("made from the description of the machine; scsi2 is a.raw")
        .says("qemu-server.conf lacks sound card (beeper)");
    let text = config("vm.vma");
    for line in [
        "sockets: 4",
        "memory: 3072",
        "name: web",
        "scsihw: pvscsi",
        "scsi2: local:100/vm-100-disk-0.raw,size=1024K",
        "#qmdump#map:scsi2:drive-scsi2:local:raw:",
    ] {
        assert!(text.lines().any(|known| known == line), "{line}: {text}");
    }
    // From the archive to a domain, and back into an archive.
    convert(&["-q", "vm.vma", "--to", "raw", "out/"]).exits(0);
    let back =
        ["-q", "out/drive-scsi2.raw", "--config", "out/web.xml", "--proxmox", "memory=512", "again.vma"];
    convert(&back).exits(0);
    let text = config("again.vma");
    assert!(text.contains("\nscsi2: ") && text.contains("\nmemory: 512\n"), "{text}");
    // Two guests, and XML that describes none.
    convert(&["a.raw", "--config", "web.ovf", "--config", "out/web.xml", "x.vma"]).exits(2).says("one guest");
    std::fs::write(dir.path().join("page.xml"), "<html/>").unwrap();
    convert(&["a.raw", "--config", "page.xml", "x.vma"]).exits(1).says("no description of a machine");
    std::fs::write(dir.path().join("bomb.xml"), "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>").unwrap();
    convert(&["a.raw", "--config", "bomb.xml", "x.vma"]).exits(1).says("document type");
}
