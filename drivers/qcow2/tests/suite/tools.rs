//! Helpers of the tests: wrappers of other programs, options, conversions.

use std::path::{Path, PathBuf};
use std::process::Command;

use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::{
    CancelToken, Compress, CreateOptions, Driver, ExternalPolicy, Externals, Input, Manifest, NoProgress,
    OpenOptions, Output, Registry, Result,
};
use serde_json::Value;

/// True if a program is installed. If not, the test is skipped, or fails in CI.
pub fn have(program: &str) -> bool {
    let installed = Command::new(program).arg("--version").output().is_ok();
    if !installed {
        assert!(std::env::var_os("CI").is_none(), "{program} is missing");
        println!("SKIPPED: {program} is missing (Debian: qemu-utils)");
    }
    installed
}

/// Runs a program that must succeed. Returns its standard output.
#[track_caller]
pub fn run(program: &str, directory: &Path, args: &[&str]) -> String {
    let (code, out, err) = run_any(program, directory, args);
    assert_eq!(code, 0, "{program} {args:?}: {out}{err}");
    out
}

/// Runs a program. Returns exit code, standard output and standard error.
#[track_caller]
pub fn run_any(program: &str, directory: &Path, args: &[&str]) -> (i32, String, String) {
    let output = Command::new(program).args(args).current_dir(directory).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Runs a program that must succeed. Returns the JSON that it prints.
#[track_caller]
pub fn run_json(program: &str, directory: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&run(program, directory, args)).unwrap()
}

/// Parses creation options `a=b,c=d`; a part `compress` turns on compression.
pub fn options(text: &str) -> CreateOptions {
    let mut options = CreateOptions::default();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some((key, value)) => {
                options.options.insert(key.to_owned(), value.to_owned());
            }
            None => options.compress = Some(Compress { algorithm: None, level: None }),
        }
    }
    options
}

/// Registry with the drivers qcow2 and raw.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    imgtool_qcow2::register(&mut registry);
    imgtool_raw::register(&mut registry);
    registry
}

/// Options that allow external files in the image's own directory.
pub fn open_options() -> OpenOptions {
    let policy = ExternalPolicy { chain: true, paths: Vec::new() };
    OpenOptions { externals: Externals::new(registry(), policy), ..OpenOptions::default() }
}

/// Creates or truncates a file.
pub fn new_output(path: &Path) -> Output {
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    Output::from_new_file(path, file)
}

/// Converts with the pipeline. Returns the path of the result.
pub fn convert(
    from: (&dyn Driver, &Path, &OpenOptions),
    to: (&dyn Driver, &Path, &CreateOptions),
    threads: usize,
) -> Result<PathBuf> {
    let mut source = from.0.open(Input::open_plain(from.1)?, from.2)?;
    let manifest = Manifest { devices: source.info().devices.clone(), attachments: Vec::new() };
    let sink = to.0.create(new_output(to.1), &manifest, to.2)?;
    sink.begin()?;
    let job = Job {
        routes: manifest
            .devices
            .iter()
            .map(|d| Route { from: d.id, to: imgtool_toolkit::DeviceId(0) })
            .collect(),
        threads,
        progress: &NoProgress,
        cancel: CancelToken::new(),
    };
    pipeline::copy(&mut *source, &*sink, &job)?;
    sink.finish()?;
    Ok(to.1.to_owned())
}

/// Asserts that `qemu-img check` passes, and that `qemu-img compare` finds no difference to a raw file.
#[track_caller]
pub fn assert_clean(directory: &Path, image: &str, raw: &str) {
    let (code, out, err) = run_any("qemu-img", directory, &["check", "-f", "qcow2", image]);
    assert_eq!(code, 0, "qemu-img check {image}: {out}{err}");
    let (code, out, err) =
        run_any("qemu-img", directory, &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
    assert_eq!(code, 0, "qemu-img compare {image} {raw}: {out}{err}");
}
