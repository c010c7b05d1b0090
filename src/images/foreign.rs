//! The formats of other programs that no driver knows. They are known by name, so that none is taken
//! for raw: reading one would make a disk of its tables, writing one would make a raw image of a
//! wrong name.

use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::{Driver, Error, Registry, Result};

/// A format of another program.
struct Foreign {
    /// For a person.
    name: &'static str,
    /// What qemu-img and people call it.
    called: &'static [&'static str],
    /// Extensions of its files, without those that others have too.
    extensions: &'static [&'static str],
    /// Where its files have which bytes.
    magics: &'static [(usize, &'static [u8])],
}

const FOREIGN: [Foreign; 7] = [
    Foreign {
        name: "VMDK",
        called: &["vmdk"],
        extensions: &["vmdk"],
        magics: &[(0, b"KDMV"), (0, b"# Disk DescriptorFile")],
    },
    Foreign {
        name: "VDI",
        called: &["vdi"],
        extensions: &["vdi"],
        magics: &[(64, &[0x7f, 0x10, 0xda, 0xbe])],
    },
    Foreign {
        name: "VHD",
        called: &["vhd", "vpc"],
        extensions: &["vhd", "vpc", "avhd"],
        magics: &[(0, b"conectix")],
    },
    Foreign { name: "QED", called: &["qed"], extensions: &["qed"], magics: &[(0, b"QED\0")] },
    Foreign {
        name: "Parallels",
        called: &["parallels"],
        extensions: &["hds"],
        magics: &[(0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")],
    },
    Foreign { name: "OVA", called: &["ova", "ovf"], extensions: &["ova", "ovf"], magics: &[] },
    Foreign { name: "DMG", called: &["dmg"], extensions: &["dmg"], magics: &[] },
];

/// The foreign format that begins like this.
pub fn by_content(head: &[u8]) -> Option<&'static str> {
    let fits = |(at, magic): &(usize, &[u8])| head.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    FOREIGN.iter().find(|format| format.magics.iter().any(fits)).map(|format| format.name)
}

/// The driver called `name`, as [`Registry::get`].
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Usage`] when there is none.
pub fn driver(registry: &Registry, name: &str) -> Result<Arc<dyn Driver>> {
    let lower = name.to_ascii_lowercase();
    let foreign = FOREIGN.iter().find(|format| format.called.contains(&lower.as_str()));
    match (registry.get(name), foreign) {
        (Err(_), Some(foreign)) => Err(Error::usage(format!("{} is not read or written yet", foreign.name))
            .hint(format!("{}; qemu-img converts between {lower} and qcow2 or raw", formats(registry)))),
        (driver, _) => driver,
    }
}

/// Refuses an output whose name promises a format that is not written, unless its format was said.
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Usage`].
pub fn check_name(registry: &Registry, output: &Path, flag: &str) -> Result<()> {
    let extension = output.extension().map(|text| text.to_string_lossy().to_ascii_lowercase());
    let promised =
        FOREIGN.iter().find(|format| extension.iter().any(|e| format.extensions.contains(&e.as_str())));
    match promised {
        Some(promised) => {
            Err(Error::usage(format!("{} is not written yet", promised.name)).path(output).hint(format!(
                "{flag}FMT says what the file is to be, whatever its name; {}",
                formats(registry)
            )))
        }
        None => Ok(()),
    }
}

fn formats(registry: &Registry) -> String {
    let names: Vec<&str> = registry.drivers().map(|driver| driver.name()).collect();
    format!("formats: {}", names.join(", "))
}
