//! Command lines of programs that call qemu-img, as they pass them, with the names of our test images.

use imgtool_testing::require;

use super::is_recent;
use super::pair::Workshop;

const NOVA: &[&str] = &[
    "info disk.raw --force-share --output=json",
    "info -f qcow2 base.qcow2 --force-share --output=json",
    "create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 n.qcow2 2M",
    "create -f raw n.raw 1M",
    "convert -t none -O raw -f qcow2 base.qcow2 n.raw",
    "convert -t none -O qcow2 -f raw -c disk.raw n.qcow2",
    "resize base.qcow2 2097152",
    "resize -f raw disk.raw 2097152",
];

const GLANCE_AND_CINDER: &[&str] = &[
    "info -f qcow2 --output=json base.qcow2",
    "convert -f qcow2 -O raw base.qcow2 n.raw",
    "convert -O raw -t none -W -f qcow2 base.qcow2 n.raw",
    "convert -O qcow2 -c -f raw -m 8 disk.raw n.qcow2",
    "convert -O raw -S 0 disk.vmdk n.raw",
    "convert -t none -O raw -f vpc disk.vhd n.raw",
];

const CONTAINERIZED_DATA_IMPORTER: &[&str] = &[
    "info --output=json base.qcow2",
    "convert -t writeback -p -O raw base.qcow2 n.raw",
    "convert -t writeback -p -O raw -o preallocation=falloc base.qcow2 n.raw",
    "convert -n -t none -p -O raw base.qcow2 empty.raw",
    "resize -f raw disk.raw 2097152",
    "resize -f raw disk.raw 2097152 --preallocation=falloc",
    "create -f raw n.raw 1048576",
    "create -f raw n.raw 1048576 -o preallocation=falloc",
];

const KUBEVIRT: &[&str] = &[
    "create -f qcow2 -b disk.raw -F raw n.qcow2",
    "create -f qcow2 -o cluster_size=64k -b base.qcow2 -F qcow2 n.qcow2 2M",
    "info over.qcow2 -U --output json",
];

const PROXMOX: &[&str] = &[
    "create -o preallocation=off -f raw n.raw 4096K",
    "create -o preallocation=metadata -f qcow2 n.qcow2 4096K",
    "create -b base.qcow2 -F qcow2 -f qcow2 n.qcow2",
    "create -F qcow2 -b base.qcow2 -o extended_l2=on,cluster_size=128k,preallocation=metadata -f qcow2 n.qcow2",
    "info --output=json -f qcow2 base.qcow2",
    "convert -p -n -t none -T none -f qcow2 -O raw base.qcow2 empty.raw",
    "convert -p -f vmdk -O qcow2 disk.vmdk n.qcow2",
    "convert -p -l snapshot.name=clean -f qcow2 -O raw snap.qcow2 n.raw",
    "resize -f qcow2 base.qcow2 2097152",
];

const VDSM: &[&str] = &[
    "info --output json -f qcow2 -U base.qcow2",
    "info --output json -f qcow2 -U --backing-chain over.qcow2",
    "create -f qcow2 -o compat=1.1 n.qcow2 1073741824",
    "create -f qcow2 -u -o compat=1.1 -b none.qcow2 -F qcow2 n.qcow2 1048576",
    "convert -p -t none -T none -f raw disk.raw -O qcow2 -o compat=1.1 n.qcow2",
    "convert -p -t none -T none -f qcow2 base.qcow2 -O raw -W n.raw",
    "convert -p -t none -T none -f qcow2 -O qcow2 -o compat=1.1 --bitmaps bitmap.qcow2 n.qcow2",
    "measure --output json -f qcow2 -O qcow2 over.qcow2",
    "check --output json -f qcow2 base.qcow2",
    "compare -f raw -F qcow2 -p disk.raw base.qcow2",
    "map --output json -f raw disk.raw",
];

const LIBVIRT_AND_VIRT_V2V: &[&str] = &[
    "create -f qcow2 -o compat=0.10 n.qcow2 1024K",
    "create -f qcow2 -b disk.raw -o backing_fmt=raw,compat=1.1,lazy_refcounts n.qcow2 1024K",
    "create -f qcow2 -o preallocation=metadata,compat=1.1,extended_l2=on n.qcow2 1024K",
    "convert -f raw -O qcow2 -o compat=1.1,lazy_refcounts disk.raw n.qcow2",
    "resize base.qcow2 2097152",
    "measure -f qcow2 -O raw --output json base.qcow2",
];

const PACKER_INCUS_AND_IMAGE_BUILDERS: &[&str] = &[
    "create -f qcow2 n.qcow2 40960M",
    "create -f qcow2 -b base.qcow2 -F qcow2 n.qcow2 40960M",
    "convert -O qcow2 -c disk.raw n.qcow2",
    "resize -f qcow2 base.qcow2 40960M",
    "info --output=json disk.vmdk",
    "convert -p -f qcow2 -O raw -t writeback base.qcow2 n.raw",
    "convert -c -f raw -O qcow2 -o cluster_size=2M disk.raw n.qcow2",
    "convert -O vmdk disk.raw n.vmdk",
    "convert -f raw -O vpc -o subformat=dynamic,force_size disk.raw n.vhd",
    "convert -O vhdx disk.raw n.vhdx",
];

#[test]
fn callers_notice_no_difference() {
    require!("qemu-img");
    if !is_recent() {
        return;
    }
    let workshop = Workshop::new();
    let lines = [
        NOVA,
        GLANCE_AND_CINDER,
        CONTAINERIZED_DATA_IMPORTER,
        KUBEVIRT,
        PROXMOX,
        VDSM,
        LIBVIRT_AND_VIRT_V2V,
        PACKER_INCUS_AND_IMAGE_BUILDERS,
    ];
    let differences: Vec<String> =
        lines.concat().iter().flat_map(|line| workshop.differences(line)).collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
