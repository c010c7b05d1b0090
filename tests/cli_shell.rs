//! Completions and manual pages come from the definitions of the command line.

use crate::support::oracles::require;
use crate::support::{imgtool, names, tempdir};

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = imgtool(["completions", shell]).ok().text();
        assert!(text.contains("imgtool") && text.contains("salvage"), "{shell}");
    }
    imgtool(["completions", "csh"]).go().exits(2);
}

#[test]
fn every_verb_has_a_manual_page() {
    let dir = tempdir();
    imgtool(["man"]).args([dir.path()]).ok();
    let pages = names(dir.path());
    let help = imgtool(["--help"]).ok().text();
    let verbs = help.lines().skip_while(|line| *line != "Verbs:").skip(1).take_while(|line| !line.is_empty());
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

/// What a script says in a shell, which must not complain.
fn shell(shell: &str, script: &str) -> String {
    let dir = std::path::Path::new(crate::support::run::PROGRAM).parent().unwrap();
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").unwrap_or_default());
    let run = std::process::Command::new(shell).args(["-c", script]).env("PATH", path).output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success() && said.is_empty(), "{shell}: {said}");
    String::from_utf8_lossy(&run.stdout).into_owned()
}

#[test]
fn bash_completes_verbs_formats_and_options() {
    require!("bash");
    let script = r#"source <(imgtool completions bash)
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _imgtool imgtool "${@: -1}" "${COMP_WORDS[COMP_CWORD-1]}"; echo "${COMPREPLY[*]}"; }
ask imgtool con
ask imgtool convert -O qc
ask imgtool convert -o clu
ask imgtool convert --progress j
complete -p imgtool"#;
    let said = shell("bash", script);
    assert!(said.starts_with("convert\nqcow2\ncluster_size=\njson\ncomplete "), "{said}");
}

#[test]
fn fish_completes_formats_and_options() {
    require!("fish");
    let script = "imgtool completions fish | source; complete -C 'imgtool convert -O qc'; complete -C 'imgtool convert -o clu'";
    let said = shell("fish", script);
    assert!(said.contains("qcow2\t") && said.contains("cluster_size=\t"), "{said}");
}

#[test]
fn zsh_takes_its_completions() {
    require!("zsh");
    let script =
        "autoload -Uz compinit; compinit -D; source <(imgtool completions zsh); print ${_comps[imgtool]}";
    assert_eq!(shell("zsh", script), "_imgtool\n");
}

#[test]
fn manual_pages_have_sections_and_no_empty_entries() {
    let dir = tempdir();
    imgtool(["man"]).args([dir.path()]).ok();
    let check = std::fs::read_to_string(dir.path().join("imgtool-check.1")).unwrap();
    assert!(check.contains(".SH \"EXAMPLES\"") && check.contains(".SH \"EXIT STATUS\""), "{check}");
    assert!(check.contains("changes no image"), "flags without a text: {check}");
}
