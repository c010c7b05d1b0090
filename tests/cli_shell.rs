//! Completions and manual pages come from the definitions of the command line.

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
