//! Compares `docs/json.md` with the output of the program: every printed field is documented with its
//! command, and one of the runs below prints every documented field.

use std::collections::BTreeSet;
use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, tempdir};
use serde_json::Value;

use crate::support::imgtool;

/// Returns the section of `page` under `heading`.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let start = page.find(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no section '{heading}'"));
    let text = &page[start + heading.len() + 5..];
    &text[..text.find("\n## ").unwrap_or(text.len())]
}

/// Returns everything in backticks.
fn named(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Returns the fields that the first columns of the tables name. The runs must print all of them.
fn fields(section: &str) -> BTreeSet<String> {
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let cells = rows.filter_map(|row| row.split(" |").next()).map(|cell| format!("`{cell}"));
    cells.flat_map(|cell| named(&cell)).map(|path| path.rsplit('.').next().unwrap_or("").to_owned()).collect()
}

/// Collects the keys of all objects; below `format-specific`, only those of its top level, since the rest
/// depends on the format.
fn keys(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| keys(item, found)),
        Value::Object(map) => {
            for (key, inner) in map {
                found.insert(key.clone());
                // The section on convert describes the report.
                if key == "report" {
                } else if key == "format-specific" {
                    found.extend(inner.as_object().expect("an object").keys().cloned());
                } else {
                    keys(inner, found);
                }
            }
        }
        _ => {}
    }
}

/// Runs below that do not exit with 0, because of damage, losses or differences, and their exit codes.
const FAILING: [(&str, i32); 9] = [
    ("check --output json --for azure a.vhdx", 2),
    ("convert --progress json nothing.raw x.raw", 1),
    ("convert --progress json cut.vma --to raw x.raw", 1),
    ("info --output json cut.vma", 1),
    ("convert --output json --salvage cut.vma --to raw cut.raw", 3),
    ("check --output json cut.vma", 2),
    ("compare --output json a.raw b.raw", 1),
    ("compare --output json --list a.raw b.raw", 1),
    ("compare --output json vm.vma a.raw", 1),
];

/// Returns the keys that the runs print on standard output, or with `--progress json` on standard error.
fn printed(dir: &Path, lines: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in lines {
        let code = FAILING.iter().find(|(failing, _)| failing == line).map_or(0, |(_, code)| *code);
        let run = imgtool(line.split(' ')).within(dir).go().ends_with(code);
        if line.contains("--progress json") {
            run.stderr.lines().for_each(|line| keys(&serde_json::from_str(line).expect(line), &mut found));
        } else {
            keys(&run.json(), &mut found);
        }
    }
    found
}

#[test]
fn documented_fields_match_the_output() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/json.md");
    let page = std::fs::read_to_string(page).unwrap();
    let dir = tempdir();
    let here = dir.path();
    Image::hole("x", 4 << 20).with(1 << 20, images::noise(1, 3 << 16)).write_raw(&here.join("a.raw"));
    Image::hole("x", 4 << 20).with(1 << 20, images::noise(2, 3 << 16)).write_raw(&here.join("b.raw"));
    std::fs::copy(fixture("two-disks.vma.zst"), here.join("vm.vma.zst")).unwrap();
    std::fs::write(here.join("cut.vma"), &std::fs::read(fixture("sparse.vma")).unwrap()[..93_000]).unwrap();
    for line in [
        "convert -q -c a.raw a.qcow2",
        "convert -q a.raw a.vhdx",
        "convert -q --size 5M a.raw long.raw",
        "convert -q vm.vma.zst vm.vma",
        "create -q -f qcow2 -b a.qcow2 -F qcow2 overlay.qcow2",
    ] {
        imgtool(line.split(' ')).within(here).ok();
    }
    let sections: [(&str, &[&str]); 10] = [
        (
            "info",
            &[
                "info --output json a.raw a.qcow2 a.vhdx vm.vma vm.vma.zst overlay.qcow2",
                "info --output json cut.vma",
                "info --output json --backing-chain --allow-external chain overlay.qcow2",
            ],
        ),
        (
            "convert",
            &[
                "convert --output json vm.vma --to qcow2 out/",
                "convert --output json --verify a.qcow2 c.raw",
                "convert --output json --salvage cut.vma --to raw cut.raw",
            ],
        ),
        (
            "progress",
            &[
                "convert --progress json vm.vma --to raw out2/",
                "convert --progress json vm.vma --disk drive-scsi0 --to raw scsi.raw",
                "convert --progress json nothing.raw x.raw",
                "convert --progress json cut.vma --to raw x.raw",
                "checksum --progress json a.raw vm.vma",
                "compare --progress json a.raw long.raw",
            ],
        ),
        ("map", &["map --output json a.qcow2", "map --output json vm.vma", "map --output json a.raw"]),
        (
            "check",
            &[
                "check --output json a.qcow2",
                "check --output json vm.vma",
                "check --output json a.vhdx",
                "check --output json cut.vma",
                "check --output json --for azure a.vhdx",
            ],
        ),
        (
            "compare",
            &[
                "compare --output json a.raw a.qcow2",
                "compare --output json a.raw b.raw",
                "compare --output json --list a.raw b.raw",
                "compare --output json --strict a.raw a.raw",
                "compare --output json vm.vma a.raw",
            ],
        ),
        ("checksum", &["checksum --output json a.raw vm.vma", "checksum --output json -a blake3 a.raw"]),
        (
            "create",
            &[
                "create --output json n.qcow2 1M",
                "create --output json -f qcow2 -b a.qcow2 -F qcow2 n2.qcow2",
            ],
        ),
        (
            "measure",
            &[
                "measure --output json -O qcow2 a.raw",
                "measure --output json --size 1G",
                "measure --output json -O qcow2 -c vm.vma",
            ],
        ),
        ("formats", &["formats --output json"]),
    ];
    for (heading, lines) in sections {
        let text = section(&page, heading);
        let found = printed(here, lines);
        let documented = named(text);
        let unknown: Vec<&String> = found.difference(&documented).collect();
        assert!(unknown.is_empty(), "docs/json.md, {heading}: {unknown:?} are printed and not documented");
        let missing: Vec<String> = fields(text).difference(&found).cloned().collect();
        assert!(missing.is_empty(), "docs/json.md, {heading}: {missing:?} are documented and not printed");
    }
}
