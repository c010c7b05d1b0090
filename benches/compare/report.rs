//! Reports of the results: a table on standard output, and a JSON file.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::measure::Run;
use crate::rows::Row;

/// Returns a description of the machine and of the programs.
pub fn machine() -> Value {
    let first = |command: &str| output(command).lines().next().unwrap_or_default().to_owned();
    json!({
        "cpu": first("grep -m1 'model name' /proc/cpuinfo | cut -d: -f2- | xargs"),
        "cpus": first("nproc"),
        "memory-kib": first("awk '/MemTotal/{print $2}' /proc/meminfo"),
        "kernel": first("uname -sr"),
        "imgtool": first(&format!("{} --version", env!("CARGO_BIN_EXE_imgtool"))),
        "qemu-img": first("qemu-img --version"),
        "zstd": first("zstd --version"),
    })
}

/// Returns the type of the file system that contains `dir`, such as "tmpfs".
pub fn file_system(dir: &Path) -> String {
    output(&format!("stat -f -c %T '{}'", dir.display())).trim().to_owned()
}

fn output(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

pub fn print_header(dir: &Path, rounds: usize) {
    println!("{} rounds on {}; {}\n", rounds, file_system(dir), machine());
    println!(
        "| {:<28} | {:<24} | {:>8} | {:>14} | {:>5} | {:>4} | {:>6} | {:>7} | {:>10} |",
        "conversion", "program", "median", "min–max", "ratio", "goal", "CPU", "memory", "output"
    );
    println!("|---|---|--:|--:|--:|--:|--:|--:|--:|");
}

pub fn print_row(row: &Row, runs: &[Run]) {
    let ours = runs.first().and_then(Run::median);
    for (index, run) in runs.iter().enumerate() {
        let name = if index == 0 { &row.name } else { "" };
        let Some(median) = run.median() else {
            println!(
                "| {name:<28} | {:<24} | SKIPPED: {} |",
                run.program,
                run.skipped.as_deref().unwrap_or("?")
            );
            continue;
        };
        let (low, high) = run.spread();
        let ratio = match ours {
            Some(ours) if index > 0 => format!("{:.2}", median.wall / ours.wall),
            _ => String::new(),
        };
        let goal = match row.goal {
            Some(goal) if index > 0 && !run.is_floor => format!("{goal:.1}"),
            _ => String::new(),
        };
        println!(
            "| {name:<28} | {:<24} | {:>6.3} s | {:>14} | {ratio:>5} | {goal:>4} | {:>4.2} s | {:>3} MiB | {:>6.1} MiB |",
            run.program,
            median.wall,
            format!("{low:.3}–{high:.3}"),
            median.cpu,
            median.memory / 1024,
            median.output as f64 / f64::from(1 << 20),
        );
    }
}

/// Writes all measurements so far to the JSON file.
pub fn write_json(path: &Path, dir: &Path, rounds: usize, rows: &[Value]) -> Result<(), String> {
    let whole = json!({
        "machine": machine(),
        "file-system": file_system(dir),
        "rounds": rounds,
        "rows": rows,
    });
    let text = serde_json::to_string_pretty(&whole).map_err(|e| e.to_string())?;
    std::fs::write(path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))
}

pub fn to_json(row: &Row, runs: &[Run]) -> Value {
    json!({
        "conversion": row.name,
        "goal": row.goal,
        "runs": runs.iter().map(Run::to_json).collect::<Vec<_>>(),
    })
}
