//! The pages that show commands. The tests run the blocks fenced `sh`, and their output must be that of the
//! blocks fenced `text`. Blocks fenced `console` are not run: they need more than files and the program, such
//! as cargo, a network or volumes.

use std::path::Path;
use std::process::Command;

use imgtool_testing::{fixture, tempdir, text};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Returns the lines of all fenced blocks of one language.
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

/// Returns the text of a page, by its path in the repository.
fn page(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Runs `script` with the program in `PATH`. If `expected` is given, standard output must equal it.
fn run_script(name: &str, script: &str, here: &Path, expected: Option<&str>) {
    let directory_of_program = Path::new(PROGRAM).parent().expect("the program is in a directory");
    let search = format!("{}:{}", text(directory_of_program), std::env::var("PATH").unwrap_or_default());
    let output = Command::new("bash")
        .args(["-e", "-o", "pipefail", "-c", script])
        .current_dir(here)
        .env("PATH", search)
        .env("volume", "volume")
        .output()
        .expect("bash");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {script}\n{}\n{stderr}", output.status);
    if let Some(expected) = expected {
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{name}\n{stderr}");
    }
}

/// Runs the commands of a page in a directory with the files that they need.
fn run(path: &str) {
    let page = page(path);
    let (script, expected) = (blocks(&page, "sh"), blocks(&page, "text"));
    assert!(script.contains("imgtool ") && !expected.is_empty(), "{path} runs nothing");
    let directory = tempdir();
    let here = directory.path();
    std::fs::copy(fixture("two-disks.vma.zst"), here.join("backup.vma.zst")).unwrap();
    let whole = std::fs::read(fixture("sparse.vma")).unwrap();
    std::fs::write(here.join("damaged.vma"), &whole[..93_000]).unwrap();
    std::fs::File::create(here.join("volume")).unwrap().set_len(5_255_168).unwrap();
    let disk = here.join("disk.qcow2");
    let source = fixture("two-disks.vma.zst");
    imgtool(["convert", text(&source), "--disk", "drive-efidisk0", "--to", "qcow2", text(&disk)]).ok();
    run_script(path, &script, here, Some(&expected));
}

#[test]
fn readme_commands_succeed() {
    let script = blocks(&page("README.md"), "sh");
    let made = tempdir();
    let here = |name: &str| made.path().join(name);
    let archive = fixture("two-disks.vma.zst");
    for name in
        ["a.qcow2", "a.vhdx", "b.raw", "disk.qcow2", "disk.vhdx", "disk.vmdk", "disk.raw", "volume.raw"]
    {
        imgtool(["convert", text(&archive), "--disk", "drive-efidisk0", text(&here(name))]).ok();
    }
    std::fs::write(here("pass"), "a passphrase\n").unwrap();
    let lock = ["convert", "-o", "encrypt=luks,encrypt.iterations=1000", "--secret"];
    let secret = format!("file={}", text(&here("pass")));
    imgtool(lock).args([&secret, text(&here("b.raw")), text(&here("locked.qcow2"))]).ok();
    std::fs::copy(&archive, here("vm.vma.zst")).unwrap();
    imgtool(["convert", text(&archive), text(&here("vm.vma"))]).ok();
    std::fs::copy(fixture("qemu-server.conf"), here("qemu-server.conf")).unwrap();
    // Each line runs alone: it finds the sources, but no output of another line.
    let lines: Vec<_> = script.lines().filter(|line| !line.is_empty()).collect();
    assert!(lines.len() > 20, "the README runs nothing");
    for line in lines {
        let directory = tempdir();
        for entry in std::fs::read_dir(made.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
        }
        run_script("README.md", line, directory.path(), None);
    }
}

#[test]
fn tour_prints_the_documented_output() {
    run("docs/tour.md");
}

#[test]
fn proxmox_backup_recipe_prints_the_documented_output() {
    run("docs/recipes/proxmox-backup.md");
}

#[test]
fn proxmox_template_recipe_prints_the_documented_output() {
    run("docs/recipes/proxmox-template.md");
}

#[test]
fn rescue_recipe_prints_the_documented_output() {
    run("docs/recipes/rescue.md");
}

#[test]
fn volumes_recipe_prints_the_documented_output() {
    run("docs/recipes/volumes.md");
}

#[test]
fn overlays_recipe_prints_the_documented_output() {
    run("docs/recipes/overlays.md");
}

#[test]
fn encrypted_recipe_prints_the_documented_output() {
    run("docs/recipes/encrypted.md");
}

#[test]
fn ova_recipe_prints_the_documented_output() {
    run("docs/recipes/ova.md");
}

#[test]
fn vmware_recipe_prints_the_documented_output() {
    run("docs/recipes/vmware.md");
}

#[test]
fn azure_recipe_prints_the_documented_output() {
    run("docs/recipes/azure.md");
}

#[test]
fn gce_recipe_prints_the_documented_output() {
    run("docs/recipes/gce.md");
}

#[test]
fn every_recipe_has_a_test() {
    let names = imgtool_testing::names(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes"));
    assert_eq!(
        names,
        [
            "azure.md",
            "encrypted.md",
            "gce.md",
            "ova.md",
            "overlays.md",
            "proxmox-backup.md",
            "proxmox-template.md",
            "rescue.md",
            "vmware.md",
            "volumes.md"
        ]
    );
}
