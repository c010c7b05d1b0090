//! Conversions to compare, with the commands of the peers and the goals.

/// One conversion: our command and the commands of the peers.
pub struct Row {
    pub name: String,
    /// Names of the source images that the commands need.
    pub inputs: Vec<String>,
    /// Our command; `{i}` stands for imgtool.
    pub ours: String,
    pub peers: Vec<Peer>,
    /// Goal for the ratio of the fastest peer's time to ours, if there is one.
    pub goal: Option<f64>,
}

/// Another program's command for the same conversion, or for an unavoidable part of it.
pub struct Peer {
    pub name: &'static str,
    /// Command; `{b}` stands for this benchmark, `{i}` for imgtool.
    pub command: String,
    /// True if the command does only an unavoidable part of the work.
    pub is_floor: bool,
}

fn peer(name: &'static str, command: impl Into<String>) -> Peer {
    Peer { name, command: command.into(), is_floor: false }
}

fn floor(name: &'static str, command: impl Into<String>) -> Peer {
    Peer { name, command: command.into(), is_floor: true }
}

fn row(name: &str, input: &str, ours: &str, peers: Vec<Peer>, goal: Option<f64>) -> Row {
    let ours = format!("{{i}} convert -q {ours}");
    Row { name: name.into(), inputs: vec![input.into()], ours, peers, goal }
}

/// Returns qemu-img with its defaults and with its fastest settings, both with the arguments `rest`.
fn qemu(rest: &str) -> Vec<Peer> {
    vec![
        peer("qemu-img", format!("qemu-img convert {rest}")),
        peer("qemu-img -W -m 16", format!("qemu-img convert -W -m 16 {rest}")),
    ]
}

/// Returns all rows in the order of the report.
pub fn rows() -> Vec<Row> {
    let mut rows = plain();
    rows.extend(other_disks());
    rows.extend(compressed());
    rows.extend(archives());
    rows.extend(empty());
    rows
}

fn plain() -> Vec<Row> {
    let pair = |name, from: &str, to: &str, input: &str, goal| {
        let rest = format!("-f {from} -O {to} {input} out");
        row(name, input, &rest, qemu(&rest), Some(goal))
    };
    let mut rows = vec![
        pair("raw → raw", "raw", "raw", "a.raw", 1.3),
        pair("raw → qcow2", "raw", "qcow2", "a.raw", 1.2),
        pair("raw → vhdx", "raw", "vhdx", "a.raw", 1.2),
        pair("qcow2 → raw", "qcow2", "raw", "a.qcow2", 1.2),
        pair("vhdx → qcow2", "vhdx", "qcow2", "a.vhdx", 1.2),
        pair("sparse 1 TiB raw → raw", "raw", "raw", "sparse.raw", 1.2),
        pair("sparse 1 TiB raw → qcow2", "raw", "qcow2", "sparse.raw", 1.2),
    ];
    rows[0].peers.push(floor("cp --sparse=auto", "cp --sparse=auto a.raw out"));
    for index in [0, 1, 3] {
        rows[index].peers.push(floor("floor: only writing", "{b} --write-floor a.raw out"));
        rows[index].inputs.push("a.raw".into());
    }
    let reflink = peer("cp --reflink=always", "cp --reflink=always a.raw out");
    rows.push(row("raw → raw, shared blocks", "a.raw", "-f raw -O raw a.raw out", vec![reflink], Some(0.8)));
    rows
}

/// Returns the conversions from and to the disk formats of VMware, Microsoft and VirtualBox, and of an encrypted
/// image.
fn other_disks() -> Vec<Row> {
    const STREAM: &str = "-f raw -O vmdk -o subformat=streamOptimized a.raw out";
    const DECODE: &str = "-f vmdk -O qcow2 stream.vmdk out";
    const SECRET: &str = "--object secret,id=s,file=passphrase";
    let mut rows = Vec::new();
    // qemu-img names VHD differently, and rounds its size unless an option forbids that.
    for (format, options) in [("vmdk", ""), ("vpc", "-o force_size=on "), ("vdi", "")] {
        let name = if format == "vpc" { "vhd" } else { format };
        let (to, from) = (format!("-f raw -O {format}"), format!("-f {format} -O raw a.{name} out"));
        let (ours, theirs) = (format!("{to} a.raw out"), format!("{to} {options}a.raw out"));
        rows.push(row(&format!("raw → {name}"), "a.raw", &ours, qemu(&theirs), Some(1.2)));
        rows.push(row(&format!("{name} → raw"), &format!("a.{name}"), &from, qemu(&from), Some(1.2)));
    }
    for row in &mut rows {
        row.peers.push(floor("floor: only writing", "{b} --write-floor a.raw out"));
        row.inputs.push("a.raw".into());
    }
    rows.push(row("raw → streamOptimized", "a.raw", STREAM, qemu(STREAM), Some(5.0)));
    rows.push(row("streamOptimized → qcow2", "stream.vmdk", DECODE, qemu(DECODE), Some(2.0)));
    let theirs = "--image-opts driver=qcow2,file.filename=luks.qcow2,encrypt.key-secret=s -O raw out";
    rows.push(row(
        "encrypted qcow2 → raw",
        "luks.qcow2",
        "-f qcow2 --secret file=passphrase -O raw luks.qcow2 out",
        qemu(&format!("{SECRET} {theirs}")),
        Some(1.0),
    ));
    rows
}

fn compressed() -> Vec<Row> {
    let fastest = |rest: &str| vec![peer("qemu-img -W -m 16", format!("qemu-img convert -W -m 16 {rest}"))];
    let zlib = "-c -f raw -O qcow2 a.raw out";
    let zstd = "-c -o compression_type=zstd -f raw -O qcow2 a.raw out";
    let from = |input: &str| format!("-f qcow2 -O raw {input} out");
    vec![
        row("raw → qcow2 -c, zlib", "a.raw", zlib, fastest(zlib), Some(4.0)),
        row("raw → qcow2 -c, zstd", "a.raw", zstd, fastest(zstd), Some(2.0)),
        row("qcow2 zlib → raw", "z.qcow2", &from("z.qcow2"), qemu(&from("z.qcow2")), Some(2.5)),
        row("qcow2 zstd → raw", "s.qcow2", &from("s.qcow2"), qemu(&from("s.qcow2")), Some(1.8)),
    ]
}

/// Returns the conversions whose peer is the reference VMA program, which few machines have. The floor is a
/// copy of the archive, or zstd alone.
fn archives() -> Vec<Row> {
    const TO_QCOW2: &str = "qemu-img convert -W -m 16 -f raw -O qcow2 out.d/disk-drive-scsi0.raw out.qcow2";
    let copy = || floor("floor: cp of the archive", "cp --sparse=never a.vma out");
    let mut rows = vec![
        row(
            "raw → vma",
            "a.raw",
            "-f raw -O vma drive-scsi0=a.raw out",
            vec![peer("vma create", "vma create out drive-scsi0=a.raw"), copy()],
            Some(3.0),
        ),
        row(
            "vma → raw",
            "a.vma",
            "-f vma -O raw a.vma out.raw",
            vec![peer("vma extract", "vma extract a.vma out.d"), copy()],
            Some(1.4),
        ),
        row(
            "vma → qcow2",
            "a.vma",
            "-f vma -O qcow2 a.vma out.qcow2",
            vec![peer("vma, qemu-img", format!("vma extract a.vma out.d && {TO_QCOW2}")), copy()],
            Some(2.2),
        ),
        row(
            ".vma.zst (one frame) → qcow2",
            "a.vma.zst",
            "-f vma -O qcow2 a.vma.zst out.qcow2",
            vec![
                peer(
                    "zstd, vma, qemu-img",
                    format!("zstd -dcq a.vma.zst | vma extract - out.d && {TO_QCOW2}"),
                ),
                floor("floor: zstd -d", "zstd -dcq a.vma.zst > /dev/null"),
            ],
            Some(1.7),
        ),
        row(
            ".vma.zst (seekable) → qcow2",
            "seekable.vma.zst",
            "-f vma -O qcow2 seekable.vma.zst out.qcow2",
            vec![
                peer(
                    "zstd, vma, qemu-img",
                    format!("zstd -dcq seekable.vma.zst | vma extract - out.d && {TO_QCOW2}"),
                ),
                floor("one zstd -d", "zstd -dcq seekable.vma.zst > /dev/null"),
            ],
            Some(2.8),
        ),
        row(
            "raw → .vma.zst",
            "a.raw",
            "-f raw -O vma drive-scsi0=a.raw out.vma.zst",
            vec![
                peer("vma, zstd -T0", "vma create out.vma drive-scsi0=a.raw && zstd -T0 -q out.vma"),
                floor("floor: zstd -T0", "zstd -q -T0 a.vma -o out"),
            ],
            Some(1.8),
        ),
    ];
    for index in [0, 5] {
        rows[index].inputs.push("a.vma".into());
    }
    // Both commands run the same engine, so there is no goal.
    rows.push(Row {
        name: "40 GiB scattered → vma".into(),
        inputs: vec!["scattered.raw".into()],
        ours: "{i} convert -q -f raw -O vma drive-scsi0=scattered.raw out".into(),
        peers: vec![peer("imgtool vma create", "{i} vma create out -d format=raw:drive-scsi0=scattered.raw")],
        goal: None,
    });
    rows
}

fn empty() -> Vec<Row> {
    let formats = ["raw", "qcow2", "vhdx"];
    let pairs = formats.iter().flat_map(|from| formats.iter().map(move |to| (from, to)));
    pairs
        .map(|(from, to)| {
            let rest = format!("-f {from} -O {to} empty.{from} out");
            let peers = vec![peer("qemu-img", format!("qemu-img convert {rest}"))];
            row(&format!("8 TiB empty {from} → {to}"), &format!("empty.{from}"), &rest, peers, Some(1.0))
        })
        .collect()
}
