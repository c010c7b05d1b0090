//! [`Platform`], a platform as the user names it: `azure`, `hyperv:gen2`.

use std::fmt;

use imgtool_core::{Error, Result, suggest};

use crate::rules::{RULES, Rules};

/// Generation of a virtual machine of Hyper-V and Azure, which decides about its firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// Generation 1: BIOS.
    One,
    /// Generation 2: UEFI.
    Two,
}

/// A platform, and the generation of the machine, if the user states it.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// Rules of the platform.
    pub rules: &'static Rules,
    /// Generation.
    pub generation: Option<Generation>,
}

impl Platform {
    /// Parses the name of a platform, with `:gen1` or `:gen2` behind it where the platform has generations.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for an unknown name.
    pub fn parse(word: &str) -> Result<Self> {
        let (name, generation) = match word.split_once(':') {
            Some((name, generation)) => (name, Some(generation)),
            None => (word, None),
        };
        let Some(rules) = RULES.iter().find(|rules| rules.name == name) else {
            return Err(Error::usage(format!("no platform is called '{name}'")).hint(suggest::hint(
                name,
                "platforms",
                RULES.iter().map(|rules| rules.name),
            )));
        };
        let generation = match generation {
            None => None,
            Some(_) if !rules.has_generations => {
                return Err(Error::usage(format!("{name} has no generations of machines, as in '{word}'"))
                    .hint(format!("the name of the platform is {name}")));
            }
            Some("gen1") => Some(Generation::One),
            Some("gen2") => Some(Generation::Two),
            Some(other) => {
                return Err(Error::usage(format!("{name} has no generation '{other}'"))
                    .hint(format!("{name}:gen1 or {name}:gen2")));
            }
        };
        Ok(Self { rules, generation })
    }

    /// Returns the names that [`Platform::parse`] takes, each with a description.
    pub fn names() -> Vec<(String, &'static str)> {
        let mut names = Vec::new();
        for rules in RULES {
            names.push((rules.name.to_owned(), rules.title));
            if rules.has_generations {
                names.push((format!("{}:gen1", rules.name), "a machine of generation 1, with a BIOS"));
                names.push((format!("{}:gen2", rules.name), "a machine of generation 2, with UEFI"));
            }
        }
        names
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rules.name)?;
        match self.generation {
            None => Ok(()),
            Some(Generation::One) => f.write_str(":gen1"),
            Some(Generation::Two) => f.write_str(":gen2"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_printed() {
        for (name, _) in Platform::names() {
            assert_eq!(Platform::parse(&name).unwrap().to_string(), name);
        }
        for bad in ["", "azur", "gce:gen1", "hyperv:gen3", "hyperv:"] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
    }
}
