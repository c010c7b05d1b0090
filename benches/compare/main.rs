//! Compares imgtool with other programs, conversion by conversion, in one interleaved session.
//!
//! `cargo bench --bench compare -- [OPTIONS]`
//!
//! ```text
//! --dir DIR      directory for all images: on a tmpfs (default: /dev/shm) or a disk
//! --rounds N     measured rounds, after one to warm up (default 7)
//! --only TEXT    only conversions whose name contains TEXT (repeatable)
//! --without TEXT no conversion whose name contains TEXT (repeatable)
//! --baseline PROGRAM
//!                an imgtool of another build, which runs as a further peer
//! --tree DIR     fill the file system of the main image with the files of DIR (repeatable)
//! --json FILE    write every sample to FILE, after each conversion
//! --write-floor IMAGE TARGET
//!                only write as many bytes as IMAGE has data, to the same offsets of TARGET
//! ```
//!
//! Each round runs our command and those of all peers, and begins with a different one. Memory is touched
//! before each run: in a virtual machine that returns free pages to its host, the first use of each page is
//! slow. On a disk, every measured command also flushes its output: imgtool always does, and for a peer the
//! flush is added. A run is repeated if other processes used too much CPU time. A peer that is not installed
//! or fails in the warm-up is listed as skipped.

mod floor;
mod images;
mod measure;
mod report;
mod rows;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use images::Images;
use measure::Run;
use rows::Row;

struct Options {
    dir: PathBuf,
    rounds: usize,
    only: Vec<String>,
    without: Vec<String>,
    baseline: Option<PathBuf>,
    trees: Vec<PathBuf>,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, image, target] = &args[..]
        && flag == "--write-floor"
    {
        return match floor::write(image.as_ref(), target.as_ref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("compare: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let options = match parse_options() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("compare: {message}");
            return ExitCode::from(2);
        }
    };
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("compare: {message}");
            ExitCode::FAILURE
        }
    }
}

fn parse_options() -> Result<Options, String> {
    let mut options = Options {
        dir: "/dev/shm".into(),
        rounds: 7,
        only: Vec::new(),
        without: Vec::new(),
        baseline: None,
        trees: Vec::new(),
        json: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            // `cargo bench` passes this flag to every benchmark.
            "--bench" => {}
            "--dir" => options.dir = value()?.into(),
            "--rounds" => options.rounds = value()?.parse().map_err(|_| "--rounds needs a number")?,
            "--only" => options.only.push(value()?),
            "--without" => options.without.push(value()?),
            "--baseline" => options.baseline = Some(value()?.into()),
            "--tree" => options.trees.push(value()?.into()),
            "--json" => options.json = Some(value()?.into()),
            other => return Err(format!("unknown option {other}")),
        }
    }
    if options.rounds == 0 {
        return Err("--rounds needs at least 1".into());
    }
    if options.trees.is_empty() {
        // Programs, libraries and text, as on the disk of a guest.
        options.trees = ["/usr/bin", "/usr/lib", "/usr/share"].map(PathBuf::from).to_vec();
    }
    Ok(options)
}

fn run(options: Options) -> Result<(), String> {
    let root = options.dir;
    let dir = tempfile::Builder::new()
        .prefix("imgtool-compare-")
        .tempdir_in(&root)
        .map_err(|e| format!("{}: {e}", root.display()))?;
    let is_memory = report::file_system(dir.path()) == "tmpfs";
    let images = Images::new(dir.path().to_owned(), options.trees);
    let is_selected = |row: &Row| {
        let named = |texts: &[String]| texts.iter().any(|text| row.name.contains(text));
        (options.only.is_empty() || named(&options.only)) && !named(&options.without)
    };
    let rows: Vec<Row> = rows::rows().into_iter().filter(is_selected).collect();
    let mut results = Vec::new();
    report::print_header(dir.path(), options.rounds);
    for (index, row) in rows.iter().enumerate() {
        for input in &row.inputs {
            images.make(input)?;
        }
        let runs = measure_row(row, &images, options.rounds, !is_memory, options.baseline.as_deref())?;
        report::print_row(row, &runs);
        results.push(report::to_json(row, &runs));
        if let Some(path) = &options.json {
            report::write_json(path, dir.path(), options.rounds, &results)?;
        }
        let needed = |input: &String| rows[index + 1..].iter().any(|row| row.inputs.contains(input));
        // Keep a.raw, since other images are derived from it.
        for input in row.inputs.iter().filter(|input| *input != "a.raw" && !needed(input)) {
            images.remove(input)?;
        }
    }
    Ok(())
}

fn measure_row(
    row: &Row,
    images: &Images,
    rounds: usize,
    flush: bool,
    baseline: Option<&Path>,
) -> Result<Vec<Run>, String> {
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    let ours = row.ours.replace("{i}", env!("CARGO_BIN_EXE_imgtool"));
    let mut runs = vec![Run::new("imgtool", ours, false)];
    if let Some(program) = baseline {
        let command = row.ours.replace("{i}", &program.display().to_string());
        runs.push(Run::new("imgtool, baseline", command, false));
    }
    for peer in &row.peers {
        let plain = peer.command.replace("{b}", &this.display().to_string());
        let plain = plain.replace("{i}", env!("CARGO_BIN_EXE_imgtool"));
        let flushed = format!("{plain} && find . -name 'out*' -type f -exec sync {{}} +");
        let command = if flush { flushed } else { plain };
        runs.push(Run::new(peer.name, command, peer.is_floor));
    }
    for run in &mut runs {
        run.warm_up(images.dir())?;
    }
    for round in 0..rounds {
        for index in 0..runs.len() {
            let turn = (round + index) % runs.len();
            runs[turn].sample(images.dir())?;
        }
    }
    Ok(runs)
}
