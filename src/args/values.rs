//! Argument values that shells can complete. The parser accepts any text; the code that uses a value
//! validates it and words the error.

use std::ffi::OsStr;
use std::sync::Arc;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, Command, Error};
use imgtool_core::Driver;
use imgtool_platform::Platform;

use crate::secrets::{self, SecretSource};

/// QEMU's cache modes: the values of `-t` and `-T`.
pub const CACHE_MODES: [&str; 5] = ["none", "writeback", "writethrough", "directsync", "unsafe"];

/// Kind of an argument value. Shell completions offer the words of that kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// The name of a format.
    Formats,
    /// The name of a format that is written.
    Targets,
    /// `KEY=` for the `-o` options of all formats: the parser does not know which one the value is for.
    OptionKeys,
}

impl Offer {
    fn values(self) -> Vec<PossibleValue> {
        let registry = imgtool::registry();
        match self {
            Offer::Formats | Offer::Targets => {
                let is_offered =
                    |driver: &&Arc<dyn Driver>| self == Offer::Formats || driver.capabilities().write;
                let value = |name, help| PossibleValue::new(name).help(help);
                let drivers = registry.drivers().filter(is_offered);
                drivers.map(|driver| value(driver.name(), driver.description())).collect()
            }
            Offer::OptionKeys => {
                let mut keys: Vec<(&str, String)> = Vec::new();
                for driver in registry.drivers() {
                    for spec in driver.options() {
                        match keys.iter_mut().find(|(name, _)| *name == spec.name) {
                            Some((_, help)) => *help = format!("{}, {help}", driver.name()),
                            None => keys.push((spec.name, format!("{}: {}", driver.name(), spec.help))),
                        }
                    }
                }
                let value = |(name, help): (&str, String)| PossibleValue::new(format!("{name}=")).help(help);
                keys.into_iter().map(value).chain([PossibleValue::new("help")]).collect()
            }
        }
    }
}

impl TypedValueParser for Offer {
    type Value = String;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<String, Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.values().into_iter()))
    }
}

/// Name of a platform. Shell completions offer all of them.
#[derive(Debug, Clone, Copy)]
pub struct PlatformName;

impl TypedValueParser for PlatformName {
    type Value = Platform;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<Platform, Error> {
        let parse = |text: &str| {
            Platform::parse(text).map_err(|error| match error.hint_text() {
                Some(hint) => format!("{error}; {hint}"),
                None => error.to_string(),
            })
        };
        parse.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let value = |(name, title): (String, &'static str)| PossibleValue::new(name).help(title);
        Some(Box::new(Platform::names().into_iter().map(value)))
    }
}

/// Place of a passphrase. Shell completions offer its forms.
#[derive(Debug, Clone, Copy)]
pub struct SecretPlace;

impl TypedValueParser for SecretPlace {
    type Value = SecretSource;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<SecretSource, Error> {
        secrets::parse.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let form = |(form, help): (&'static str, &'static str)| PossibleValue::new(form).help(help);
        Some(Box::new(secrets::FORMS.into_iter().map(form)))
    }
}
