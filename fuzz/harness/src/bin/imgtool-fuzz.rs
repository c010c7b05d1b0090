//! Converts images to inputs of the fuzzer and back, and runs inputs without a fuzzer.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use imgtool_core::ReadAt;
use imgtool_fuzz::scenario::Scenario;
use imgtool_fuzz::sparse::SECTOR;
use imgtool_fuzz::targets;

const USAGE: &str = "usage: imgtool-fuzz pack IMAGE INPUT          an image as an input
       imgtool-fuzz unpack TARGET INPUT IMAGE  the image in an input, checksums made right
       imgtool-fuzz run TARGET INPUT...        run inputs";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["pack", image, input] => pack(image, input),
        ["unpack", target, input, image] => unpack(target, input, image),
        ["run", target, inputs @ ..] => run(target, inputs),
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
    let file = File::create_new(image)?;
    file.set_len(sparse.len())?;
    for at in sparse.written(0..sparse.len()) {
        file.write_all_at(&sparse.bytes(at..(at + SECTOR).min(sparse.len())), at)?;
    }
    Ok(())
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
