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

const CLOUDSTACK_OPENNEBULA_AND_IRONIC: &[&str] = &[
    "info -U --output=json base.qcow2",
    "convert -U -O qcow2 base.qcow2 n.qcow2",
    "convert -p -O raw -f qcow2 base.qcow2 n.raw",
    "create -f qcow2 -o cluster_size=64k,backing_file=base.qcow2,backing_fmt=qcow2 n.qcow2 2097152",
    "create -o backing_file=base.qcow2,backing_fmt=qcow2 -f qcow2 n.qcow2",
    "convert -q -O raw base.qcow2 n.raw",
    "convert -m 4 -q -f qcow2 -O raw snap.qcow2 n.raw",
    "resize --shrink -f raw empty.raw 512K",
    "resize -f qcow2 base.qcow2 +512K",
    "convert -f qcow2 -O raw -t directsync -S 0 base.qcow2 n.raw",
    "info --force-share --output=json -f raw disk.raw",
];

const LONGHORN_HARVESTER_AND_KATA: &[&str] = &[
    "info --output=json disk.vhdx",
    "convert -f raw -O qcow2 disk.raw n.qcow2",
    "convert -p -f qcow2 -O raw -t none -T none base.qcow2 n.raw",
    "convert -f vmdk -O raw disk.vmdk n.raw",
    "create -f qcow2 n.qcow2 10737418240",
    "check -f qcow2 --output json over.qcow2",
    "create -q -f raw n.raw 128M",
    "resize -q -f raw disk.raw 2M",
];

const DISTRIBUTIONS: &[&str] = &[
    "convert -c -O qcow2 -o compat=0.10 disk.raw n.qcow2",
    "convert -f raw -O vpc -o subformat=fixed,force_size disk.raw n.vhd",
    "convert -f raw -O vmdk -o subformat=streamOptimized,adapter_type=lsilogic disk.raw n.vmdk",
    "convert -O vmdk -o subformat=monolithicSparse,compat6 disk.raw n.vmdk",
    "convert -O vhdx -o subformat=dynamic disk.raw n.vhdx",
    "convert -O vdi disk.raw n.vdi",
    "convert -f raw disk.raw -O vmdk -o adapter_type=pvscsi,subformat=monolithicFlat n.vmdk",
    "convert -f raw -O qcow2 -c -o compression_type=zstd disk.raw n.qcow2",
    "convert -f raw -O qcow2 -o compat=v3 -W -m 8 disk.raw n.qcow2",
    "convert -O qcow2 -S 128k disk.raw n.qcow2",
    "convert -O qcow2 -o cluster_size=512k,refcount_bits=16 disk.raw n.qcow2",
    "convert -f raw -O raw -S 4096 disk.raw n.raw",
];

const LOCAL_MACHINES: &[&str] = &[
    "create -q -f qcow2 -o lazy_refcounts=on,preallocation=off,nocow=on n.qcow2 16G",
    "create -q -f raw -o preallocation=off n.raw 64M",
    "check -q base.qcow2",
    "info base.qcow2 --output=json",
    "create -f qcow2 -F qcow2 -b base.qcow2 n.qcow2 107374182400",
    "create -f qcow2 n.qcow2 -F raw -b disk.raw 2M",
    "info --output=json --backing-chain over.qcow2",
    "info --output=json --force-share over.qcow2",
    "convert -p -O qcow2 base.qcow2 n.qcow2",
    "resize base.qcow2 5368709120",
    "convert -f raw -O qcow2 disk.raw n",
    "create -f qcow2 -o preallocation=metadata n.qcow2 64M",
    "measure --output=json -O raw base.qcow2",
    "map --output=json -f qcow2 over.qcow2",
    "compare -U -q base.qcow2 disk.raw",
];

const OTHER_HYPERVISORS: &[&str] = &[
    "convert -f vmdk -O qcow2 -o compat=1.1 disk.vmdk n.qcow2",
    "convert -f vpc -O qcow2 disk.vhd n.qcow2",
    "convert -f vhdx -O qcow2 disk.vhdx n.qcow2",
    "convert -f vdi -O raw disk.vdi n.raw",
    "convert -f qcow2 -O vmdk -o adapter_type=lsilogic,subformat=streamOptimized,compat6 base.qcow2 n.vmdk",
    "convert -f qcow2 -o subformat=dynamic -O vhdx base.qcow2 n.vhdx",
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
        CLOUDSTACK_OPENNEBULA_AND_IRONIC,
        LONGHORN_HARVESTER_AND_KATA,
        DISTRIBUTIONS,
        LOCAL_MACHINES,
        OTHER_HYPERVISORS,
    ];
    let differences: Vec<String> =
        lines.concat().iter().flat_map(|line| workshop.differences(line)).collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
