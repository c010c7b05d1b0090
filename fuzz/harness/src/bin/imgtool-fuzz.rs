//! Converts images to inputs of the fuzzer and back, and runs inputs without a fuzzer.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use imgtool_fuzz::chains::{Chain, Program, Totals, run, shrink};
use imgtool_fuzz::fields::fuzz::{Seeds, Tally};
use imgtool_fuzz::scenario::Scenario;
use imgtool_fuzz::targets;

const USAGE: &str = "usage: imgtool-fuzz pack IMAGE INPUT          an image as an input
       imgtool-fuzz unpack TARGET INPUT IMAGE  the image in an input, checksums made right
       imgtool-fuzz run TARGET INPUT...        run inputs
       imgtool-fuzz chains SEED MINUTES DIRECTORY  random chains; failures are saved in the directory
       imgtool-fuzz fields SEED MINUTES DIRECTORY  images with changed fields; the same
       imgtool-fuzz field NUMBER INPUT         one of these, as an input
       imgtool-fuzz chain FILE...              run chains";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["pack", image, input] => pack(image, input),
        ["unpack", target, input, image] => unpack(target, input, image),
        ["run", target, inputs @ ..] => run(target, inputs),
        ["chains", seed, minutes, directory] => chains(seed, minutes, directory),
        ["fields", seed, minutes, directory] => fields(seed, minutes, directory),
        ["field", number, input] => field(number, input),
        ["chain", files @ ..] => chain(files),
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If stderr fails too, only the exit code remains.
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn pack(image: &str, input: &str) -> Result<(), Box<dyn Error>> {
    Ok(fs::write(input, Scenario::of_file(&fs::read(image)?).encode())?)
}

fn unpack(target: &str, input: &str, image: &str) -> Result<(), Box<dyn Error>> {
    let of_input = targets::by_name(target).ok_or(USAGE)?.image.ok_or("its inputs are files as they are")?;
    let sparse = of_input(&fs::read(input)?);
    Ok(sparse.save(Path::new(image))?)
}

fn run(target: &str, inputs: &[&str]) -> Result<(), Box<dyn Error>> {
    let target = targets::by_name(target).ok_or(USAGE)?;
    for input in inputs {
        let started = std::time::Instant::now();
        (target.run)(&fs::read(input)?);
        writeln!(std::io::stdout(), "{input}: {:?}", started.elapsed())?;
    }
    Ok(())
}

/// Directory for images: memory if the system has it, since the images are short-lived.
fn scratch() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}

fn chains(seed: &str, minutes: &str, directory: &str) -> Result<(), Box<dyn Error>> {
    let program = Program::find().ok_or("no imgtool beside this program: cargo build")?;
    let time = Duration::from_secs_f64(minutes.parse::<f64>()? * 60.0);
    let (started, first) = (Instant::now(), seed.parse::<u64>()?);
    let mut totals = Totals::default();
    let mut failures = 0;
    for seed in first.. {
        if started.elapsed() > time {
            break;
        }
        let chain = Chain::random(seed);
        if let Err(failure) = run::run(&program, &chain, scratch(), &mut totals) {
            failures += 1;
            writeln!(std::io::stdout(), "seed {seed}: step {}: {}", failure.step, failure.kind)?;
            let (chain, failure) = shrink::shrink(&program, &chain, &failure, scratch());
            writeln!(std::io::stdout(), "{chain}{}\n", failure.message)?;
            fs::create_dir_all(directory)?;
            fs::write(Path::new(directory).join(seed.to_string()), chain.to_string())?;
        }
    }
    writeln!(std::io::stdout(), "{totals:?}, {failures} failures in {:?}", started.elapsed())?;
    if failures == 0 { Ok(()) } else { Err("promises were broken".into()) }
}

fn chain(files: &[&str]) -> Result<(), Box<dyn Error>> {
    let program = Program::find().ok_or("no imgtool beside this program: cargo build")?;
    for file in files {
        let chain: Chain = fs::read_to_string(file)?.parse()?;
        let result = run::run(&program, &chain, scratch(), &mut Totals::default());
        result.map_err(|failure| format!("{file}: step {}: {}", failure.step, failure.message))?;
        writeln!(std::io::stdout(), "{file}: passed")?;
    }
    Ok(())
}

fn fields(seed: &str, minutes: &str, directory: &str) -> Result<(), Box<dyn Error>> {
    let time = Duration::from_secs_f64(minutes.parse::<f64>()? * 60.0);
    let (started, first) = (Instant::now(), seed.parse::<u64>()?);
    let seeds = Seeds::find()?;
    let mut tally = Tally::default();
    std::panic::set_hook(Box::new(|_| {}));
    let current = Path::new(directory).join("current");
    fs::create_dir_all(directory)?;
    for number in first.. {
        if started.elapsed() > time {
            break;
        }
        // For an input that ends this process.
        fs::write(&current, number.to_string())?;
        let known = tally.failures.len();
        tally.run(&seeds, number, scratch())?;
        if let Some((_, message)) = tally.failures.get(known) {
            let case = seeds.case(number)?;
            fs::write(Path::new(directory).join(format!("{}-{number}", case.target)), &case.input)?;
            writeln!(std::io::stdout(), "seed {number}: {message}")?;
        }
    }
    fs::remove_file(current)?;
    for (name, (count, number)) in &tally.verdicts {
        writeln!(std::io::stdout(), "{count:6} {name} (first: {number})")?;
    }
    let failures = tally.failures.len();
    writeln!(std::io::stdout(), "{} inputs, {failures} failures in {:?}", tally.inputs, started.elapsed())?;
    if failures == 0 { Ok(()) } else { Err("promises were broken".into()) }
}

fn field(number: &str, input: &str) -> Result<(), Box<dyn Error>> {
    let case = Seeds::find()?.case(number.parse()?)?;
    writeln!(std::io::stdout(), "{}", case.target)?;
    Ok(fs::write(input, case.input)?)
}
