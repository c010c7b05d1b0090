//! Runs the chains that are kept, and the first random ones.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use imgtool_fuzz::chains::{Chain, Program, Totals, run};
use imgtool_testing::{require, tempdir};

/// Number of random chains. Our limit: about 3 seconds.
const RANDOM: u64 = 12;

/// Returns the program, which a build of the workspace makes; `None` if there is none.
fn program() -> Option<Program> {
    let program = Program::find();
    let is_ci = std::env::var_os("CI").is_some();
    assert!(program.is_some() || !is_ci, "no imgtool beside this test: cargo build");
    if program.is_none() {
        eprintln!("SKIPPED: chains: imgtool is not built");
    }
    program
}

#[test]
fn seeds_and_findings_pass() {
    require!("qemu-img", "zstd", "gzip", "xz", "bzip2", "lzop");
    let Some(program) = program() else { return };
    let directory = tempdir();
    for kind in ["seeds", "findings"] {
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(kind).join("chains");
        let entries = fs::read_dir(kept).into_iter().flatten();
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            let chain: Chain = fs::read_to_string(&path).expect("readable").parse().expect("a chain");
            let result = run::run(&program, &chain, directory.path(), &mut Totals::default());
            assert!(result.is_ok(), "{}: {result:#?}", path.display());
        }
    }
}

#[test]
fn random_chains_pass() {
    require!("qemu-img", "zstd", "gzip", "xz", "bzip2", "lzop");
    let Some(program) = program() else { return };
    let directory = tempdir();
    let mut totals = Totals::default();
    for seed in 0..RANDOM {
        let chain = Chain::random(seed);
        let result = run::run(&program, &chain, directory.path(), &mut totals);
        assert!(result.is_ok(), "seed {seed}: {result:#?}\n{chain}");
    }
    assert!(totals.outputs >= RANDOM && totals.by_qemu > 0 && totals.refusals > 0, "{totals:?}");
}

/// A program that breaks a promise after each conversion, by a line of shell in the directory of the output.
fn faulty(program: &Program, directory: &Path, fault: &str) -> Program {
    let path = directory.join("faulty");
    let real = program.0.display();
    let script =
        format!("#!/bin/sh\n'{real}' \"$@\"\ncode=$?\n[ $1 = convert ] && {{ {fault}; }}\nexit $code\n");
    fs::write(&path, script).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    Program(path)
}

#[test]
fn broken_promises_are_noticed() {
    require!("qemu-img", "zstd", "gzip", "xz", "bzip2", "lzop");
    let Some(program) = program() else { return };
    let directory = tempdir();
    let put =
        |name: &str, at: u32| format!("printf X | dd of={name} bs=1 seek={at} conv=notrunc status=none");
    for (step, fault, kind) in [
        ("raw", put("d0.raw", 70_000), "raw-content"),
        ("raw", "fallocate -l 2M d0.raw".to_owned(), "raw-sparse"),
        ("raw in-place=512", put("d0.raw", 2_097_152), "raw-tail"),
        ("raw", "touch .d0.raw.partial-0123".to_owned(), "files"),
        ("raw", "code=3".to_owned(), "exit"),
        ("raw", "code=0".to_owned(), "refusal-Overwrite"),
        ("raw", "date +%N > d0.raw".to_owned(), "bytes-threads"),
        ("qcow2", put("d0.qcow2", 66_000), "qcow2-content"),
        ("vhdx", put("d0.vhdx", 4_194_400), "vhdx-content"),
        ("vma", put("vm.vma", 15_000), "vma-content"),
        ("vma.gz", put("vm.vma.gz", 200), "vma-check"),
    ] {
        let text = format!("disk 2097152 noise:0+1000\nstep {step} overwrite\n");
        let chain: Chain = text.parse().expect("a chain");
        let faulty = faulty(&program, directory.path(), &fault);
        let result = run::run(&faulty, &chain, directory.path(), &mut Totals::default());
        let found = result.map_err(|failure| (failure.kind, failure.message));
        assert_eq!(
            found.as_ref().map_err(|(kind, _)| kind.as_str()),
            Err(kind),
            "{step}: {fault}: {found:?}"
        );
    }
}
