//! Runs one command and measures it: wall time in this process, CPU time and memory with GNU time.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Maximum CPU time of other processes during a run, as a share of its wall time; above it, the run is
/// repeated.
const DISTURBED: f64 = 0.15;

/// Maximum number of repetitions of a disturbed run.
const REPEATS: usize = 2;

/// Time limit of a run in seconds: several times the duration of the slowest conversion.
const LONGEST: &str = "90";

/// Measurements of one run.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Wall time in seconds.
    pub wall: f64,
    /// User and system time in seconds.
    pub cpu: f64,
    /// Peak resident memory of the largest process, in KiB.
    pub memory: u64,
    /// Allocated size of the outputs in bytes.
    pub output: u64,
    /// CPU time of all other processes during the run, in seconds.
    pub others: f64,
}

/// Runs of one program in one conversion.
pub struct Run {
    pub program: &'static str,
    command: String,
    /// True if the command does only an unavoidable part of the work.
    pub is_floor: bool,
    samples: Vec<Sample>,
    /// Reason for skipping the command; `None` if it is measured.
    pub skipped: Option<String>,
}

impl Run {
    pub fn new(program: &'static str, command: String, is_floor: bool) -> Self {
        Self { program, command, is_floor, samples: Vec::new(), skipped: None }
    }

    /// Runs the command once without recording a sample. A peer that is not installed or fails is skipped
    /// from then on; a failure of imgtool is an error.
    pub fn warm_up(&mut self, dir: &Path) -> Result<(), String> {
        for part in self.command.split(['|', '&']).filter(|part| !part.trim().is_empty()) {
            let program = part.split_whitespace().next().unwrap_or_default();
            let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
            if !found.is_ok_and(|output| output.status.success()) {
                self.skipped = Some(format!("{program} is not installed"));
                return Ok(());
            }
        }
        if let Err(message) = self.execute(dir) {
            if self.program == "imgtool" {
                return Err(message);
            }
            self.skipped = Some(message);
        }
        Ok(())
    }

    pub fn sample(&mut self, dir: &Path) -> Result<(), String> {
        if self.skipped.is_some() {
            return Ok(());
        }
        let mut sample = self.execute(dir)?;
        for _ in 0..REPEATS {
            if sample.others <= DISTURBED * sample.wall + 0.03 {
                break;
            }
            sample = self.execute(dir)?;
        }
        self.samples.push(sample);
        Ok(())
    }

    fn execute(&self, dir: &Path) -> Result<Sample, String> {
        clear(dir)?;
        touch_memory();
        let report = dir.join("time.txt");
        let busy = busy_seconds();
        let started = Instant::now();
        let output = Command::new("/usr/bin/time")
            .args(["-f", "%U %S %M", "-o"])
            .arg(&report)
            .args(["timeout", LONGEST, "sh", "-c", &self.command])
            .current_dir(dir)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("/usr/bin/time (package time): {e}"))?;
        let wall = started.elapsed().as_secs_f64();
        let busy = busy_seconds() - busy;
        // timeout(1) exits with 124 if it stopped the command.
        if output.status.code() == Some(124) {
            clear(dir)?;
            return Err(format!("takes longer than {LONGEST} s"));
        }
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            let _ = clear(dir);
            return Err(format!("{}: {}", self.command, error.lines().next().unwrap_or("failed")));
        }
        let text = std::fs::read_to_string(&report).map_err(|e| e.to_string())?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [user, system, memory] = numbers[..] else { return Err(format!("unreadable: {text}")) };
        let output = occupied(dir)?;
        clear(dir)?;
        let cpu = user + system;
        Ok(Sample { wall, cpu, memory: memory as u64, output, others: (busy - cpu).max(0.0) })
    }

    /// Returns the median of each quantity; `None` without samples.
    pub fn median(&self) -> Option<Sample> {
        let middle = |pick: fn(&Sample) -> f64| {
            let mut values: Vec<f64> = self.samples.iter().map(pick).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied()
        };
        Some(Sample {
            wall: middle(|sample| sample.wall)?,
            cpu: middle(|sample| sample.cpu)?,
            memory: middle(|sample| sample.memory as f64)? as u64,
            output: middle(|sample| sample.output as f64)? as u64,
            others: middle(|sample| sample.others)?,
        })
    }

    /// Returns the shortest and the longest wall time in seconds.
    pub fn spread(&self) -> (f64, f64) {
        let walls = self.samples.iter().map(|sample| sample.wall);
        (walls.clone().fold(f64::INFINITY, f64::min), walls.fold(0.0, f64::max))
    }

    /// Returns the command with the names of imgtool and this benchmark in place of their paths.
    fn named_command(&self) -> String {
        let this = std::env::current_exe().map(|path| path.display().to_string()).unwrap_or_default();
        self.command.replace(env!("CARGO_BIN_EXE_imgtool"), "imgtool").replace(&this, "compare")
    }

    pub fn to_json(&self) -> serde_json::Value {
        let json = |s: &Sample| {
            serde_json::json!({
                "wall": s.wall, "cpu": s.cpu, "memory-kib": s.memory, "output": s.output, "others": s.others
            })
        };
        let samples: Vec<_> = self.samples.iter().map(json).collect();
        serde_json::json!({
            "program": self.program,
            "command": self.named_command(),
            "skipped": self.skipped,
            "samples": samples,
        })
    }
}

/// Touches as much memory as the largest conversion writes, so that the host backs these pages before the
/// measured run needs them.
fn touch_memory() {
    const LEN: usize = 3 << 30;
    const PAGE: usize = 4096;
    let mut bytes: Vec<u8> = vec![0; LEN];
    for page in bytes.chunks_mut(PAGE) {
        page[0] = 1;
    }
    std::hint::black_box(&bytes);
}

/// Returns the busy CPU time of all processors since boot, in seconds. proc_stat(5) counts user, nice,
/// system, irq and softirq time in hundredths.
fn busy_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let numbers: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    [0, 1, 2, 5, 6].iter().filter_map(|index| numbers.get(*index)).sum::<f64>() / 100.0
}

/// Returns the outputs of the last run: every entry whose name begins with `out`.
fn outputs(dir: &Path) -> Result<Vec<std::path::PathBuf>, String> {
    let entries = std::fs::read_dir(dir).map_err(|e| e.to_string())?.flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("out"));
    Ok(ours.map(|entry| entry.path()).collect())
}

/// Returns the allocated size in bytes of the last run's outputs, without the files in an output directory.
fn occupied(dir: &Path) -> Result<u64, String> {
    let files = outputs(dir)?;
    Ok(files.iter().filter_map(|path| std::fs::metadata(path).ok()).map(|meta| meta.blocks() * 512).sum())
}

/// Removes the outputs of the last run.
fn clear(dir: &Path) -> Result<(), String> {
    for path in outputs(dir)? {
        let removed =
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
