//! Running one command and measuring it: wall time here, CPU time and memory by GNU time.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// What one run took.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Seconds.
    pub wall: f64,
    /// Seconds of user and system time.
    pub cpu: f64,
    /// Peak resident memory, KiB.
    pub memory: u64,
}

/// One program's runs of one conversion.
pub struct Run {
    pub program: &'static str,
    command: String,
    samples: Vec<Sample>,
    /// Why it was not run.
    pub skipped: Option<String>,
}

impl Run {
    pub fn new(program: &'static str, command: String) -> Self {
        Self { program, command, samples: Vec::new(), skipped: None }
    }

    /// Runs once without measuring; a program that is missing or can't do this here is skipped.
    pub fn warm_up(&mut self, dir: &Path) -> Result<(), String> {
        let program = self.command.split_whitespace().next().unwrap_or_default();
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            self.skipped = Some(format!("{program} is not installed"));
            return Ok(());
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
        if self.skipped.is_none() {
            let sample = self.execute(dir)?;
            self.samples.push(sample);
        }
        Ok(())
    }

    fn execute(&self, dir: &Path) -> Result<Sample, String> {
        clear(dir)?;
        let report = dir.join("time.txt");
        let started = Instant::now();
        let output = Command::new("/usr/bin/time")
            .args(["-f", "%U %S %M", "-o"])
            .arg(&report)
            .args(["sh", "-c", &self.command])
            .current_dir(dir)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("/usr/bin/time (package time): {e}"))?;
        let wall = started.elapsed().as_secs_f64();
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{}: {}", self.command, error.lines().next().unwrap_or("failed")));
        }
        let text = std::fs::read_to_string(&report).map_err(|e| e.to_string())?;
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [user, system, memory] = numbers[..] else { return Err(format!("unreadable: {text}")) };
        clear(dir)?;
        Ok(Sample { wall, cpu: user + system, memory: memory as u64 })
    }

    /// The median of each quantity.
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
        })
    }

    /// Shortest and longest wall time.
    pub fn spread(&self) -> (f64, f64) {
        let walls = self.samples.iter().map(|sample| sample.wall);
        (walls.clone().fold(f64::INFINITY, f64::min), walls.fold(0.0, f64::max))
    }

    pub fn to_json(&self) -> serde_json::Value {
        let samples: Vec<_> = self
            .samples
            .iter()
            .map(|s| serde_json::json!({ "wall": s.wall, "cpu": s.cpu, "memory-kib": s.memory }))
            .collect();
        serde_json::json!({ "program": self.program, "skipped": self.skipped, "samples": samples })
    }
}

/// Removes what the last run made: everything whose name begins with `out`.
fn clear(dir: &Path) -> Result<(), String> {
    for entry in std::fs::read_dir(dir).map_err(|e| e.to_string())?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("out") {
            let path = entry.path();
            let removed =
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    Ok(())
}
