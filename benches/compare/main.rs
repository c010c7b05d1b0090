//! imgtool beside its peers, conversion by conversion, in one interleaved session.
//!
//! `cargo bench --bench compare -- [--dir DIR] [--rounds N] [--only TEXT] [--tree DIR] [--json FILE]`
//!
//! Builds its images in DIR (default: a directory in /dev/shm; give one on a disk to measure that),
//! runs every command once to warm the page cache and then N rounds (default 7), our command and the
//! peers' in turn, and prints medians, spread, ratios, CPU time and peak memory. A peer that is not
//! installed is named as skipped.

mod images;
mod measure;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use measure::{Run, Sample};

/// One conversion: ours, and how others do the same.
struct Row {
    name: &'static str,
    ours: String,
    peers: Vec<(&'static str, String)>,
    /// Peer time ÷ our time that we mean to reach.
    goal: f64,
}

struct Options {
    dir: Option<PathBuf>,
    rounds: usize,
    only: Option<String>,
    tree: PathBuf,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = match parse_options() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("compare: {message}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("compare: {message}");
            ExitCode::FAILURE
        }
    }
}

fn parse_options() -> Result<Options, String> {
    let mut options =
        Options { dir: None, rounds: 7, only: None, tree: PathBuf::from("/usr/lib"), json: None };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            // What `cargo bench` passes to every benchmark.
            "--bench" => {}
            "--dir" => options.dir = Some(value()?.into()),
            "--rounds" => options.rounds = value()?.parse().map_err(|_| "--rounds needs a number")?,
            "--only" => options.only = Some(value()?),
            "--tree" => options.tree = value()?.into(),
            "--json" => options.json = Some(value()?.into()),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), String> {
    let root = match &options.dir {
        Some(dir) => dir.clone(),
        None => PathBuf::from("/dev/shm"),
    };
    let dir = tempfile::Builder::new()
        .prefix("imgtool-compare-")
        .tempdir_in(&root)
        .map_err(|e| format!("{}: {e}", root.display()))?;
    images::build(dir.path(), &options.tree)?;
    let mut results = Vec::new();
    print_header();
    for row in rows() {
        if options.only.as_ref().is_some_and(|only| !row.name.contains(only.as_str())) {
            continue;
        }
        let runs = measure_row(&row, dir.path(), options.rounds)?;
        print_row(&row, &runs);
        results.push(to_json(&row, &runs));
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&results).map_err(|e| e.to_string())?;
        std::fs::write(path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

/// The conversions. `{i}` is our program, inputs are those of [`images`], outputs begin with `out`.
fn rows() -> Vec<Row> {
    const QEMU: &str = "qemu-img convert";
    const QEMU_W: &str = "qemu-img convert -W -m 16";
    let both = |rest: &str| {
        vec![("qemu-img", format!("{QEMU} {rest}")), ("qemu-img -W -m 16", format!("{QEMU_W} {rest}"))]
    };
    let row =
        |name, ours: &str, peers, goal| Row { name, ours: format!("{{i}} convert -q {ours}"), peers, goal };
    let mut rows = vec![
        row("raw → raw", "-f raw -O raw a.raw out", both("-f raw -O raw a.raw out"), 1.3),
        row("raw → qcow2", "-f raw -O qcow2 a.raw out", both("-f raw -O qcow2 a.raw out"), 1.2),
        row("qcow2 → raw", "-f qcow2 -O raw a.qcow2 out", both("-f qcow2 -O raw a.qcow2 out"), 1.2),
        row("raw → vhdx", "-f raw -O vhdx a.raw out", both("-f raw -O vhdx a.raw out"), 1.2),
        row("vhdx → qcow2", "-f vhdx -O qcow2 a.vhdx out", both("-f vhdx -O qcow2 a.vhdx out"), 1.2),
        row(
            "raw → qcow2 -c zlib",
            "-c -f raw -O qcow2 a.raw out",
            vec![("qemu-img -W -m 16", format!("{QEMU_W} -c -f raw -O qcow2 a.raw out"))],
            4.0,
        ),
        row(
            "raw → qcow2 -c zstd",
            "-c -o compression_type=zstd -f raw -O qcow2 a.raw out",
            vec![(
                "qemu-img -W -m 16",
                format!("{QEMU_W} -c -o compression_type=zstd -f raw -O qcow2 a.raw out"),
            )],
            2.0,
        ),
        row("qcow2 zlib → raw", "-f qcow2 -O raw z.qcow2 out", both("-f qcow2 -O raw z.qcow2 out"), 2.5),
        row("qcow2 zstd → raw", "-f qcow2 -O raw s.qcow2 out", both("-f qcow2 -O raw s.qcow2 out"), 1.8),
    ];
    rows[0].peers.push(("cp --sparse=auto", "cp --sparse=auto a.raw out".into()));
    rows[0].peers.push(("cp --reflink", "cp --reflink=always a.raw out".into()));
    rows.extend(vma_rows());
    for (name, from, to) in [
        ("8 TiB empty raw → qcow2", "raw", "qcow2"),
        ("8 TiB empty raw → vhdx", "raw", "vhdx"),
        ("8 TiB empty qcow2 → raw", "qcow2", "raw"),
        ("8 TiB empty qcow2 → vhdx", "qcow2", "vhdx"),
        ("8 TiB empty vhdx → raw", "vhdx", "raw"),
        ("8 TiB empty vhdx → qcow2", "vhdx", "qcow2"),
    ] {
        let rest = format!("-f {from} -O {to} empty.{from} out");
        rows.push(row(name, &rest, vec![("qemu-img", format!("{QEMU} {rest}"))], 1.0));
    }
    rows
}

/// Conversions whose peer is the reference VMA program, which few machines have.
fn vma_rows() -> Vec<Row> {
    const TO_QCOW2: &str = "qemu-img convert -W -m 16 -f raw -O qcow2 out.d/disk-drive-scsi0.raw out.qcow2";
    let peer = |command: String| vec![("vma", command)];
    let row = |name, ours: &str, peers, goal| Row { name, ours: ours.into(), peers, goal };
    vec![
        row(
            "raw → vma",
            "{i} convert -q -f raw -O vma drive-scsi0=a.raw out",
            peer("vma create out drive-scsi0=a.raw".into()),
            3.0,
        ),
        row(
            "vma → raw",
            "{i} convert -q -f vma -O raw a.vma out",
            peer("vma extract a.vma out.d".into()),
            1.4,
        ),
        row(
            "vma → qcow2",
            "{i} convert -q -f vma -O qcow2 a.vma out",
            peer(format!("vma extract a.vma out.d && {TO_QCOW2}")),
            2.2,
        ),
        row(
            "vma.zst (one frame) → qcow2",
            "{i} convert -q -f vma -O qcow2 a.vma.zst out",
            peer(format!("zstd -dcq a.vma.zst | vma extract - out.d && {TO_QCOW2}")),
            1.7,
        ),
        row(
            "vma.zst (seekable) → qcow2",
            "{i} convert -q -f vma -O qcow2 seekable.vma.zst out",
            peer(format!("zstd -dcq seekable.vma.zst | vma extract - out.d && {TO_QCOW2}")),
            2.8,
        ),
        row(
            "raw → vma.zst",
            "{i} convert -q -f raw -O vma drive-scsi0=a.raw out.vma.zst",
            peer("vma create out.vma drive-scsi0=a.raw && zstd -T0 -q out.vma".into()),
            1.8,
        ),
    ]
}

fn measure_row(row: &Row, dir: &Path, rounds: usize) -> Result<Vec<Run>, String> {
    let ours = row.ours.replace("{i}", env!("CARGO_BIN_EXE_imgtool"));
    let mut runs = vec![Run::new("imgtool", ours)];
    runs.extend(row.peers.iter().map(|(name, command)| Run::new(name, command.clone())));
    for run in &mut runs {
        run.warm_up(dir)?;
    }
    for _ in 0..rounds {
        for run in &mut runs {
            run.sample(dir)?;
        }
    }
    Ok(runs)
}

fn print_header() {
    println!(
        "{:<28} {:<18} {:>8} {:>15} {:>7} {:>6} {:>7} {:>8}",
        "conversion", "program", "median", "min..max", "ratio", "goal", "cpu", "memory"
    );
}

fn print_row(row: &Row, runs: &[Run]) {
    let ours = runs[0].median().map(|sample| sample.wall);
    for (index, run) in runs.iter().enumerate() {
        let name = if index == 0 { row.name } else { "" };
        let Some(Sample { wall, cpu, memory }) = run.median() else {
            println!("{name:<28} {:<18} SKIPPED: {}", run.program, run.skipped.as_deref().unwrap_or("?"));
            continue;
        };
        let (low, high) = run.spread();
        let (ratio, goal) = match ours {
            Some(ours) if index > 0 => (format!("{:.2}", wall / ours), format!("{:.1}", row.goal)),
            _ => (String::new(), String::new()),
        };
        println!(
            "{name:<28} {:<18} {wall:>7.3}s {:>15} {ratio:>7} {goal:>6} {cpu:>6.2}s {:>5} MiB",
            run.program,
            format!("{low:.3}..{high:.3}"),
            memory / 1024,
        );
    }
}

fn to_json(row: &Row, runs: &[Run]) -> serde_json::Value {
    serde_json::json!({
        "conversion": row.name,
        "goal": row.goal,
        "runs": runs.iter().map(Run::to_json).collect::<Vec<_>>(),
    })
}
