//! COT, the Common OVF Tool: an independent reader of OVF descriptors, with descriptors of other programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::run;
use crate::text;

fn python() -> String {
    std::env::var("IMGTOOL_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned())
}

/// True if the interpreter `IMGTOOL_TEST_PYTHON`, by default python3, can import COT.
pub(super) fn cot_found() -> bool {
    let mut command = Command::new(python());
    let command = command.args(["-c", "import COT.vm_description.ovf"]).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

const SCRIPT: &str = r#"
import sys
from COT.vm_description.ovf import OVF
with OVF(sys.argv[1], None) as machine:
    machine.validate_hardware()
    print(machine.info_string(verbosity_option="verbose"))
"#;

/// Returns the description that COT prints of a descriptor.
#[track_caller]
pub fn cot_reads(descriptor: &Path) -> String {
    String::from_utf8_lossy(&run(&python(), &["-c", SCRIPT, text(descriptor)]).stdout).into_owned()
}

/// Returns the descriptors of other programs that COT is tested with.
#[track_caller]
pub fn cot_samples() -> Vec<PathBuf> {
    let script = "import os, COT; print(os.path.join(os.path.dirname(COT.__file__), 'tests'))";
    let directory = run(&python(), &["-c", script]).stdout;
    let directory = PathBuf::from(String::from_utf8_lossy(&directory).trim());
    let entries = std::fs::read_dir(&directory).expect("the directory of COT's tests");
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut paths: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|end| end == "ovf")).collect();
    paths.sort();
    paths
}
