//! Formats of other programs that no driver supports yet, by the names that users state. A raw output would get
//! a wrong extension. `contents.rs` recognises files by their content.

use std::sync::Arc;

use imgtool_core::{Driver, Error, Location, Registry, Remedy, Result};

/// A format of another program.
struct Foreign {
    /// Name in messages.
    name: &'static str,
    /// Names that a user may state, including those of qemu-img.
    called: &'static [&'static str],
    /// File name extensions that no other format uses.
    extensions: &'static [&'static str],
}

const FOREIGN: [Foreign; 1] = [Foreign { name: "OVA", called: &["ova", "ovf"], extensions: &["ova", "ovf"] }];

/// Returns the driver called `name`. Like [`Registry::get`], with a better error for foreign formats.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if no driver has this name.
pub fn driver(registry: &Registry, name: &str) -> Result<Arc<dyn Driver>> {
    let lower = name.to_ascii_lowercase();
    let foreign = FOREIGN.iter().find(|format| format.called.contains(&lower.as_str()));
    match (registry.get(name), foreign) {
        (Err(_), Some(foreign)) => Err(Error::usage(format!("{} is not supported yet", foreign.name)).hint(
            format!("{}; an OVA is a tar archive of an OVF document and VMDK disks", formats(registry)),
        )),
        (driver, _) => driver,
    }
}

/// Refuses a format that is only read as that of an output.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for such a format.
pub fn check_writes(registry: &Registry, driver: &dyn Driver) -> Result<()> {
    if driver.capabilities().write {
        return Ok(());
    }
    Err(Error::usage(format!("{} is read, but not written", driver.name()))
        .remedied_by(Remedy::NameTargetFormat { advice: formats(registry) }))
}

/// Refuses an output name with the extension of a foreign format, unless the user states a format.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for the extension of a foreign format.
pub fn check_name(registry: &Registry, output: &Location) -> Result<()> {
    let name = output.file_name().unwrap_or_default().to_ascii_lowercase();
    let promised = name.rsplit_once('.').and_then(|(stem, extension)| {
        FOREIGN.iter().find(|format| !stem.is_empty() && format.extensions.contains(&extension))
    });
    match promised {
        Some(promised) => Err(Error::usage(format!("{} is not supported yet", promised.name))
            .path(output)
            .remedied_by(Remedy::NameTargetFormat { advice: formats(registry) })),
        None => Ok(()),
    }
}

fn formats(registry: &Registry) -> String {
    let writers = registry.drivers().filter(|driver| driver.capabilities().write);
    let names: Vec<&str> = writers.map(|driver| driver.name()).collect();
    format!("formats: {}", names.join(", "))
}
