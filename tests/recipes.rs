//! The recipes of `docs/recipes/`: what a reader would type is run, and what the page shows as output
//! must come out.

use std::path::Path;
use std::process::Command;

use crate::support::run::PROGRAM;
use crate::support::{fixture, imgtool, tempdir, text};

/// The lines of all fenced blocks of one language.
fn blocks(page: &str, language: &str) -> String {
    let (mut inside, mut found) = (false, String::new());
    for line in page.lines() {
        match line.strip_prefix("```") {
            Some(fence) => inside = !inside && fence == language,
            None if inside => {
                found.push_str(line);
                found.push('\n');
            }
            None => {}
        }
    }
    found
}

/// Runs a page in a directory that has the files it starts from.
fn run(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes").join(name);
    let page = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (script, expected) = (blocks(&page, "sh"), blocks(&page, "text"));
    assert!(script.contains("imgtool ") && !expected.is_empty(), "{name} runs nothing");
    let directory = tempdir();
    let here = directory.path();
    std::fs::copy(fixture("two-disks.vma.zst"), here.join("backup.vma.zst")).unwrap();
    let whole = std::fs::read(fixture("sparse.vma")).unwrap();
    std::fs::write(here.join("damaged.vma"), &whole[..93_000]).unwrap();
    std::fs::File::create(here.join("volume")).unwrap().set_len(5_255_168).unwrap();
    let disk = here.join("disk.qcow2");
    let source = fixture("two-disks.vma.zst");
    imgtool(["convert", text(&source), "--disk", "drive-efidisk0", "--to", "qcow2", text(&disk)]).ok();
    let directory_of_program = Path::new(PROGRAM).parent().expect("the program is in a directory");
    let search = format!("{}:{}", text(directory_of_program), std::env::var("PATH").unwrap_or_default());
    let output = Command::new("bash")
        .args(["-e", "-o", "pipefail", "-c", &script])
        .current_dir(here)
        .env("PATH", search)
        .env("volume", "volume")
        .output()
        .expect("bash");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {}\n{stderr}", output.status);
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{name}\n{stderr}");
}

#[test]
fn a_proxmox_backup_elsewhere() {
    run("proxmox-backup.md");
}

#[test]
fn a_template_for_proxmox() {
    run("proxmox-template.md");
}

#[test]
fn a_damaged_backup() {
    run("rescue.md");
}

#[test]
fn volumes() {
    run("volumes.md");
}

#[test]
fn every_recipe_is_run() {
    let names = crate::support::names(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes"));
    assert_eq!(names, ["proxmox-backup.md", "proxmox-template.md", "rescue.md", "volumes.md"]);
}
