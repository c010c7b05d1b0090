//! Completion scripts. clap generates them from the definition of the command line. For the value of `-o`,
//! bash, fish and zsh get functions of our own, which complete the options of the chosen format and their
//! values.

use std::fmt::Write as _;

use clap::builder::PossibleValuesParser;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use imgtool_core::{OptionSpec, Registry};

use crate::args::Cli;

/// Placeholder in clap's output for the call of our function.
const MARK: &str = "__IMGTOOL_OPTION__";

/// Identifier of the `-o` arguments in clap.
const OPTIONS: &str = "options";

/// Returns the completion script of a shell.
pub fn script(shell: Shell) -> String {
    let mut command = Cli::command();
    if matches!(shell, Shell::Bash | Shell::Zsh | Shell::Fish) {
        command = with_mark(command);
    }
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "imgtool", &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    let registry = imgtool::registry();
    match shell {
        Shell::Bash => text + &bash(&registry) + include_str!("completions.bash"),
        Shell::Fish => {
            let call = text.replace(&format!("{MARK}\\t''"), "(__imgtool_option)");
            call + &fish(&registry) + include_str!("completions.fish")
        }
        Shell::Zsh => {
            // Our functions must precede the last lines, which register or call the completion.
            let call = text.replace(&format!("({MARK})"), "_imgtool_option");
            let (definitions, end) = call.split_at(call.rfind("\nif [").unwrap_or(call.len()));
            let own = zsh(&registry) + include_str!("completions.zsh");
            format!("{definitions}{own}{end}")
        }
        _ => text,
    }
}

/// Makes the placeholder the only value of `-o`.
fn with_mark(command: Command) -> Command {
    command
        .mut_args(|arg| {
            if arg.get_id() == OPTIONS { arg.value_parser(PossibleValuesParser::new([MARK])) } else { arg }
        })
        .mut_subcommands(with_mark)
}

/// Returns the options of each format by its name, and the options of all formats under the empty name.
fn by_format(registry: &Registry) -> Vec<(&'static str, Vec<OptionSpec>)> {
    let mut all: Vec<OptionSpec> = Vec::new();
    let mut list: Vec<(&str, Vec<OptionSpec>)> = Vec::new();
    for driver in registry.drivers() {
        list.push((driver.name(), driver.options().to_vec()));
        for spec in driver.options() {
            if !all.iter().any(|known| known.name == spec.name) {
                all.push(*spec);
            }
        }
    }
    list.push(("", all));
    list
}

/// Returns the values of an option if they are a fixed list, otherwise an empty list.
fn words(spec: &OptionSpec) -> Vec<String> {
    let values = spec.kind.to_string();
    if values.contains('|') { values.split('|').map(str::to_owned).collect() } else { Vec::new() }
}

fn bash(registry: &Registry) -> String {
    let (mut keys, mut values) = (String::new(), String::new());
    for (format, specs) in by_format(registry) {
        let names: Vec<String> = specs.iter().map(|spec| format!("{}=", spec.name)).collect();
        let pattern = if format.is_empty() { "*" } else { format };
        let _ = writeln!(keys, "        {pattern}) echo \"{} help\" ;;", names.join(" "));
        for spec in specs.iter().filter(|spec| !words(spec).is_empty()) {
            let list = words(spec).join(" ");
            let pattern = if format.is_empty() { "*" } else { format };
            let _ = writeln!(values, "        {pattern}:{}) echo \"{list}\" ;;", spec.name);
        }
    }
    format!(
        "\n_imgtool_keys() {{\n    case \"$1\" in\n{keys}    esac\n}}\n\n_imgtool_words() {{\n    case \"$1\" in\n{values}    esac\n}}\n"
    )
}

fn fish(registry: &Registry) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
    let (mut keys, mut values) = (String::new(), String::new());
    for (format, specs) in by_format(registry) {
        let pattern = if format.is_empty() { "'*'" } else { format };
        let names: Vec<String> =
            specs.iter().map(|spec| quoted(&format!("{}=\t{}", spec.name, spec.help))).collect();
        let _ = writeln!(
            keys,
            "        case {pattern}\n            printf '%s\\n' {} 'help\tlist the options'",
            names.join(" ")
        );
        for spec in specs.iter().filter(|spec| !words(spec).is_empty()) {
            let pattern = if format.is_empty() { "*" } else { format };
            let _ = writeln!(
                values,
                "        case '{pattern}:{}'\n            printf '%s\\n' {}",
                spec.name,
                words(spec).join(" ")
            );
        }
    }
    format!(
        "\nfunction __imgtool_keys\n    switch $argv[1]\n{keys}    end\nend\n\nfunction __imgtool_words\n    switch $argv[1]\n{values}    end\nend\n"
    )
}

fn zsh(registry: &Registry) -> String {
    let mut cases = String::new();
    for (format, specs) in by_format(registry) {
        let specs: Vec<String> = specs
            .iter()
            .map(|spec| {
                let help = spec.help.replace('\'', "'\\''").replace(':', "\\:").replace(['[', ']'], "");
                format!("'{}[{help}]:value:({})'", spec.name, words(spec).join(" "))
            })
            .collect();
        let pattern = if format.is_empty() { "*" } else { format };
        let _ = writeln!(
            cases,
            "        {pattern})\n            options=(\n                {}\n                'help[list the options]'\n            ) ;;",
            specs.join("\n                ")
        );
    }
    format!("\n_imgtool_specs() {{\n    case $1 in\n{cases}    esac\n}}\n")
}
