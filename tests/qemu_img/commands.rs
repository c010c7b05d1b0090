//! Flags and options, each beside qemu-img.

use imgtool_testing::require;

use super::is_recent;
use super::pair::Workshop;

#[track_caller]
fn behaves_the_same(lines: &[&str]) {
    if !is_recent() {
        return;
    }
    let workshop = Workshop::new();
    let differences: Vec<String> = lines.iter().flat_map(|line| workshop.differences(line)).collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn creates_images_with_backing_files() {
    require!("qemu-img");
    behaves_the_same(&[
        "create -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=metadata,extended_l2=on n.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=metadata,extended_l2=on,cluster_size=128k n.qcow2 9M",
        "create -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=falloc,extended_l2=on n.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=full,extended_l2=on n.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=metadata n.qcow2",
        "create -f qcow2 -b base.qcow2 -o backing_fmt=qcow2 n.qcow2",
        "create -f qcow2 -b base.qcow2 n.qcow2",
        "create -f qcow2 -F qcow2 -o backing_file=base.qcow2 n.qcow2",
        "create -f qcow2 -o backing_file=none.qcow2,backing_fmt=raw -b base.qcow2 -F qcow2 n.qcow2",
        "create -f qcow2 -F qcow2 n.qcow2 1M",
        "create -u -f qcow2 -b none.qcow2 -F qcow2 n.qcow2 1M",
        "create -f qcow2 -b none.qcow2 -F qcow2 n.qcow2 1M",
        "convert -B base.qcow2 -o backing_fmt=qcow2 -O qcow2 disk.raw n.qcow2",
        "convert -B base.qcow2 -F qcow2 -O qcow2 disk.raw n.qcow2",
        "convert -B base.qcow2 -O qcow2 disk.raw n.qcow2",
        "convert -F qcow2 -o backing_file=base.qcow2 -O qcow2 disk.raw n.qcow2",
    ]);
}

#[test]
fn takes_the_options_of_create() {
    require!("qemu-img");
    behaves_the_same(&[
        "create -f qcow2 -o cluster_size=4k,cluster_size=8k -o cluster_size=128k n.qcow2 1M",
        "create -f qcow2 -o size=3M n.qcow2",
        "create -f qcow2 -o size=3M,size=4M n.qcow2",
        "create -f qcow2 -o size=3M n.qcow2 1M",
        "create -f raw -o size=0x100000 n.raw",
        "create -f qcow2 -o nocow=on n.qcow2 1M",
        "create -f raw -o nocow=on,extent_size_hint=1M n.raw 1M",
        "create -f qcow2 -o nocow=perhaps n.qcow2 1M",
        "create -f qcow2 -o encryption=off n.qcow2 1M",
        "create -f qcow2 -o encryption=on n.qcow2 1M",
        "create -f vhdx -o block_state_zero=off n.vhdx 8M",
        "create -f vhdx -o block_state_zero=on n.vhdx 8M",
        "create -f vhdx -o block_state_zero n.vhdx 8M",
        "convert -O qcow2 -o size=9M disk.raw n.qcow2",
        "convert -O qcow2 -o size=x disk.raw n.qcow2",
        "measure -O qcow2 -o size=9M disk.raw",
        "create -q -f raw old.raw 1M",
        "create -q -f qcow2 old.raw 1M",
        "create -q n.qcow2 1M",
        "create -f vpc -o force_size=on n.vhd 1M",
        "create -f bad n.raw 1M",
    ]);
}

#[test]
fn takes_every_spelling_of_a_size() {
    require!("qemu-img");
    let sizes = [
        "1.5M", ".5M", "1.M", "1k", "1K", "1b", "1B", "1.0", "1.0b", "+1M", "0x100000", "0xE", "0XB", "010",
        "0", "513", "1.0001k", "2.00001M", "1e3", "1.5", "1.5b", "1G5", "1,5G", "-1M", "0x10k", "0x", "inf",
        "8E", ".",
    ];
    let lines: Vec<String> = sizes.iter().map(|size| format!("create -f raw n.raw -- {size}")).collect();
    behaves_the_same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn is_as_strict_about_spellings() {
    require!("qemu-img");
    behaves_the_same(&[
        "create -f qcow2 -o nolazy_refcounts n.qcow2 1M",
        "create -f qcow2 -o nolazy_refcounts=on n.qcow2 1M",
        "create -f qcow2 -o nocow n.qcow2 1M",
        "create -f qcow2 -o cluster_size=64k, n.qcow2 1M",
        "create -f qcow2 -o ,cluster_size=64k n.qcow2 1M",
        "create -f qcow2 -o cluster_size=64KiB n.qcow2 1M",
        "create -f qcow2 -o size=1MiB n.qcow2",
        "create -f qcow2 n.qcow2 5MiB",
        "convert -S 4KiB disk.raw n.raw",
        "convert -O qcow2 -o cluster_size=64k, disk.raw n.qcow2",
        "convert -O qcow2 -o nolazy_refcounts disk.raw n.qcow2",
        "measure -O qcow2 --size 5MiB",
        "resize base.qcow2 2000001",
        "resize base.qcow2 +1",
        "resize base.qcow2 +1MiB",
        "resize -f raw disk.raw 2000001",
        "resize -f raw empty.raw 512k",
        "resize --shrink -f raw empty.raw 512k",
        "resize base.qcow2 512k",
        "resize --shrink base.qcow2 512k",
    ]);
}

#[test]
fn takes_snapshots_by_id_and_by_name() {
    require!("qemu-img");
    behaves_the_same(&[
        "convert -l clean -O raw snap.qcow2 n.raw",
        "convert -l 1 -O raw snap.qcow2 n.raw",
        "convert -l snapshot.id=1 -O raw snap.qcow2 n.raw",
        "convert -l snapshot.name=clean -O raw snap.qcow2 n.raw",
        "convert -l snapshot.name=clean,snapshot.id=1 -O raw snap.qcow2 n.raw",
        "convert -l snapshot.name=clean,snapshot.id=2 -O raw snap.qcow2 n.raw",
        "convert -l snapshot.id=clean -O raw snap.qcow2 n.raw",
        "convert -l snapshot.name=1 -O raw snap.qcow2 n.raw",
        "convert -l snapshot.foo=1 -O raw snap.qcow2 n.raw",
        "convert -l other -O raw snap.qcow2 n.raw",
        "convert --snapshot=clean -O raw snap.qcow2 n.raw",
        "measure -l snapshot.name=clean -O qcow2 snap.qcow2",
    ]);
}

#[test]
fn takes_long_flags() {
    require!("qemu-img");
    behaves_the_same(&[
        "convert --source-format=raw --output-format=qcow2 --options=cluster_size=8k --source-cache=none \
         --sparse-size=4k --force-share --rate=100M --parallel=2 --oob-writes --quiet disk.raw n.qcow2",
        "convert --source-image-opts -O raw driver=qcow2,file.filename=base.qcow2,lazy-refcounts=on n.raw",
        "convert --copy-range-offloading --backing=base.qcow2 --backing-format=qcow2 --output-format=qcow2 disk.raw n",
        "convert --output-f qcow2 --source-f raw disk.raw n.qcow2",
        "create --format=qcow2 --quiet --backing=base.qcow2 --backing-format=qcow2 --options=cluster_size=4k n.qcow2",
        "create --backing-unsafe --format=qcow2 n.qcow2 1M",
        "info --format=qcow2 --force-share --output=json base.qcow2",
        "info -b --output=json over.qcow2",
        "info --backing-chain --output=json over.qcow2",
        "map -s 256k -l 64k --output=json base.qcow2",
        "map --start-offset=256k --max-length=64k --output=json base.qcow2",
        "compare --a-format=raw --b-format=qcow2 --cache=none --force-share disk.raw base.qcow2",
        "compare --strict --quiet disk.raw base.qcow2",
        "measure --target-format=qcow2 --size=1G --output=json",
        "measure --target-format=qcow2 --format=raw --options=cluster_size=4k --force-share --output=json disk.raw",
        "check --cache=none --format=qcow2 --force-share --quiet base.qcow2",
        "check --repair=all base.qcow2",
        "resize --quiet --format=qcow2 --preallocation=off base.qcow2 2M",
        "resize --preallocation=falloc --format=raw disk.raw 2M",
        "resize --shrink --format=raw disk.raw 512k",
    ]);
}

#[test]
fn prints_the_same_json() {
    require!("qemu-img");
    behaves_the_same(&[
        "info --output=json disk.raw",
        "info --output=json over.qcow2",
        "info --output=json snap.qcow2",
        "info --output=json bitmap.qcow2",
        "info --output=json packed.qcow2",
        "info --output=json disk.vmdk",
        "info --output=json over.vmdk",
        "info --output=json over.qed",
        "info --output=json disk.vhd",
        "info --output=json disk.vhdx",
        "info --output=json disk.vdi",
        "info --output=json text.html",
        "info --output=json raw.qcow2",
        "info --output=json disk.raw.gz",
        "map --output=json disk.raw",
        "map --output=json over.qcow2",
        "map --output=json packed.qcow2",
        "check --output=json base.qcow2",
        "check --output=json disk.vhdx",
        "measure -O qcow2 --output=json disk.raw",
        "measure -O qcow2 --output=json base.qcow2",
        "measure -O qcow2 --output=json bitmap.qcow2",
        "measure -O qcow2 --output=json -o compat=0.10 bitmap.qcow2",
        "measure -O raw --output=json bitmap.qcow2",
        "measure -O luks --object secret,id=s,file=text.html -o key-secret=s --size 1G --output=json",
    ]);
}

#[test]
fn prints_the_same_text() {
    require!("qemu-img");
    behaves_the_same(&[
        "map disk.raw",
        "map base.qcow2",
        "map packed.qcow2",
        "map -s 100M packed.qcow2",
        "check base.qcow2",
        "check disk.raw",
        "check -f raw base.qcow2",
        "check -r leaks base.qcow2",
        "check disk.vmdk",
        "check disk.vdi",
        "check disk.vhdx",
        "measure -O qcow2 bitmap.qcow2",
        "compare disk.raw base.qcow2",
        "compare disk.raw bitmap.qcow2",
        "compare disk.raw old.raw",
        "compare empty.raw old.raw",
        "compare -s disk.raw old.raw",
        "compare over.qcow2 disk.raw",
        "compare over.qcow2 bitmap.qcow2",
        "compare -s base.qcow2 over.qcow2",
        "compare -s over.qcow2 empty.raw",
        "compare -s base.qcow2 bitmap.qcow2",
        "compare -s empty.raw disk.raw",
        "info disk.raw",
        "info base.qcow2",
        "info over.qcow2",
        "info snap.qcow2",
        "info over.qed",
        "info packed.qcow2",
        "info disk.vhdx",
        "info disk.vdi",
        "info --backing-chain over.qcow2",
        "compare -p disk.raw base.qcow2",
        "convert -p -O raw base.qcow2 n.raw",
        "convert -p -q -O raw base.qcow2 n.raw",
        "resize -f raw disk.raw 2M",
    ]);
}

#[test]
fn names_and_contents_say_nothing() {
    require!("qemu-img");
    behaves_the_same(&[
        "convert -O raw text.html n.raw",
        "convert -O raw raw.qcow2 n.raw",
        "convert -O raw disk.raw.gz n.raw",
        "convert -f raw -O qcow2 disk.raw.gz n.qcow2.gz",
        "convert base.qcow2 n.qcow2",
        "convert base.qcow2 n.vmdk.zst",
        "create n.vhdx 1M",
        "check raw.qcow2",
    ]);
}

#[test]
fn fails_with_the_same_codes() {
    require!("qemu-img");
    behaves_the_same(&[
        "--bogus",
        "frobnicate",
        "convert",
        "convert disk.raw",
        "convert --nonsense disk.raw n.raw",
        "convert none.raw n.raw",
        "convert -n disk.raw none.raw",
        "convert -O bad disk.raw n.raw",
        "compare disk.raw",
        "compare disk.raw none.raw",
        "compare -f bad disk.raw disk.raw",
        "check",
        "check none",
        "check --bad",
        "info",
        "info none",
        "map none",
        "measure",
        "measure none",
        "create",
        "create n.raw",
        "resize -f raw disk.raw",
        "resize base.qcow2 64k",
    ]);
}
