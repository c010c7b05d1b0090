//! Completions and manual pages, which are generated from the definitions of the command line.

use imgtool_testing::{names, require, tempdir};

use crate::support::imgtool;

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = imgtool(["completions", shell]).ok().text();
        assert!(text.contains("imgtool") && text.contains("salvage"), "{shell}");
    }
    imgtool(["completions", "csh"]).go().exits(2);
}

#[test]
fn every_command_has_a_manual_page() {
    let dir = tempdir();
    imgtool(["man"]).args([dir.path()]).ok();
    let pages = names(dir.path());
    let help = imgtool(["--help"]).ok().text();
    let verbs =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let verbs: Vec<&str> = verbs
        .filter(|line| !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(verbs.len() >= 10, "{help}");
    for verb in verbs {
        assert!(pages.contains(&format!("imgtool-{verb}.1")), "{verb}: {pages:?}");
    }
    let convert = std::fs::read_to_string(dir.path().join("imgtool-convert.1")).unwrap();
    assert!(convert.contains("allow\\-external") && convert.contains("partial"), "{convert}");
    assert!(imgtool(["man"]).ok().text().contains("SYNOPSIS"));
}

/// Runs a script in a shell, which must succeed with empty standard error, and returns its standard output.
fn shell(shell: &str, script: &str) -> String {
    let dir = std::path::Path::new(crate::support::run::PROGRAM).parent().unwrap();
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap_or_default());
    // The time limit ends scripts that wait for output that never comes.
    let run = std::process::Command::new("timeout")
        .args(["120", shell, "-c", script])
        .env("PATH", path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success() && said.is_empty(), "{shell}: {said}");
    String::from_utf8_lossy(&run.stdout).into_owned()
}

#[test]
fn bash_completes_commands_formats_and_options() {
    require!("bash");
    // The words are split at each '=', as bash splits them.
    let script = r#"source <(imgtool completions bash)
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _imgtool_or_option imgtool "${@: -1}" "${COMP_WORDS[COMP_CWORD-1]}"; echo "${COMPREPLY[*]}"; }
ask imgtool con
ask imgtool convert -O qc
ask imgtool convert --progress j
ask imgtool convert -o clu
ask imgtool convert -O raw -o ""
ask imgtool convert --to = vhdx -o b
ask imgtool create -f vma -o ""
ask imgtool create --options = clu
ask imgtool convert -O qcow2 -o compat = ""
ask imgtool convert -O qcow2 -o compat = 1
ask imgtool convert -O qcow2 -o compat = 1.1,ref
ask imgtool convert -O qcow2 -o compat=1.1,preallocation=f
ask imgtool convert -O raw -o preallocation = f
ask imgtool convert -o compat = 1.1 --verif
ask imgtool convert --secret f
ask imgtool create --target-secret ""
complete -p imgtool"#;
    let said = shell("bash", script);
    let lines: Vec<&str> = said.lines().collect();
    let expected = [
        "convert",
        "qcow2",
        "json",
        "cluster_size=",
        "preallocation= encrypt= help",
        "block_size= block_state_zero= backing_file= backing_fmt=",
        "uuid= ctime= help",
        "cluster_size=",
        "0.10 1.1 v2 v3",
        "1.1",
        "1.1,refcount_bits=",
        "compat=1.1,preallocation=falloc compat=1.1,preallocation=full",
        "falloc full",
        "--verify",
        "file= fd=",
        "file= env= fd=",
    ];
    assert_eq!(lines[..lines.len() - 1], expected);
    assert!(said.contains("complete -o bashdefault -o default -F _imgtool_or_option imgtool"), "{said}");
}

#[test]
fn fish_completes_formats_and_options() {
    require!("fish");
    for (line, wanted) in [
        ("imgtool convert -O qc", ["qcow2"].as_slice()),
        ("imgtool convert -o clu", &["cluster_size="]),
        ("imgtool convert -O raw -o ", &["encrypt=", "help", "preallocation="]),
        ("imgtool create -f vma -o ", &["ctime=", "help", "uuid="]),
        ("imgtool convert --to=vhdx --options=block_si", &["--options=block_size="]),
        ("imgtool convert -O qcow2 -o compat=", &["compat=0.10", "compat=1.1", "compat=v2", "compat=v3"]),
        ("imgtool convert -O qcow2 -o compat=1.1,ref", &["compat=1.1,refcount_bits="]),
        ("imgtool convert -O raw -o preallocation=f", &["preallocation=falloc", "preallocation=full"]),
        ("imgtool checksum --secret ", &["env=", "fd=", "file="]),
    ] {
        let said = shell("fish", &format!("imgtool completions fish | source; complete -C '{line}'"));
        let words: Vec<&str> =
            said.lines().map(|line| line.split_once('\t').map_or(line, |(word, _)| word)).collect();
        assert_eq!(words, wanted, "{line}: {said}");
    }
}

#[test]
fn zsh_loads_its_completions() {
    require!("zsh");
    let script =
        "autoload -Uz compinit; compinit -D; source <(imgtool completions zsh); print ${_comps[imgtool]}";
    assert_eq!(shell("zsh", script), "_imgtool\n");
}

#[test]
fn zsh_completes_format_options() {
    require!("zsh");
    // The script presses the tab key in a pseudo-terminal and waits for the completion. If it never appears,
    // the time limit ends the script.
    for (line, wanted) in [
        ("imgtool convert -O vhdx -o block_si", "-o block_size="),
        ("imgtool convert -O qcow2 -o compat=1.1,ref", "compat=1.1,refcount_bits="),
        ("imgtool create -f raw -o preallocation=fa", "preallocation=falloc"),
    ] {
        let script = format!(
            r#"zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z 'autoload -Uz compinit; compinit -D -u; source <(imgtool completions zsh); PS1="at your service:"'
zpty -r z said $'*at your service:*at your service:*'
zpty -w -n z '{line}'$'\t'
zpty -r z said '*{wanted}*'
print found"#
        );
        assert_eq!(shell("zsh", &script), "found\n", "{line}");
    }
}

#[test]
fn manual_pages_have_sections_and_no_empty_entries() {
    let dir = tempdir();
    imgtool(["man"]).args([dir.path()]).ok();
    let check = std::fs::read_to_string(dir.path().join("imgtool-check.1")).unwrap();
    assert!(check.contains(".SH \"EXAMPLES\"") && check.contains(".SH \"EXIT STATUS\""), "{check}");
    assert!(check.contains("all that can be repaired"), "flags without a text: {check}");
}

#[test]
fn manual_pages_pass_mandoc_lint() {
    require!("mandoc");
    let dir = tempdir();
    imgtool(["man"]).args([dir.path()]).ok();
    for page in names(dir.path()) {
        let mut lint = std::process::Command::new("mandoc");
        let lint =
            lint.args(["-T", "lint", "-W", "warning", &page]).current_dir(dir.path()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&lint.stdout), "", "{page}");
    }
}
