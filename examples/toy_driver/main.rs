//! A custom driver alongside the built-in ones: converts from and to *slab*, a format invented for this
//! example.
//!
//! ```sh
//! cargo run --release --example toy_driver -- fixtures/sparse.vma target/sparse.slab
//! cargo run --release --example toy_driver -- target/sparse.slab target/sparse.qcow2
//! ```
//!
//! `slab.rs` is the driver; the tests below are all that is needed to check it against the laws of the
//! toolkit. `docs/drivers.md` explains both.

use std::path::Path;
use std::process::ExitCode;

use imgtool_toolkit::{Conversion, Input, OpenOptions, Registry, Result};

mod slab;

/// The built-in drivers and ours. The order does not matter: raw is used only if no other format matches.
fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(slab::SlabDriver);
    imgtool_qcow2::register(&mut registry);
    imgtool_vhdx::register(&mut registry);
    imgtool_vma::register(&mut registry);
    imgtool_raw::register(&mut registry);
    registry
}

/// Converts `from` into the format that the extension of `to` names.
fn convert(from: &Path, to: &Path) -> Result<String> {
    let registry = registry();
    let mut opened = registry.open(Input::open(from)?, None, &OpenOptions::default())?;
    let driver = match registry.by_extension(&to.to_string_lossy()) {
        Some(driver) => driver,
        None => registry.get("raw")?,
    };
    let totals = Conversion::new(&*driver).threads(4).overwrite(true).to_file(&mut *opened.source, to)?;
    Ok(format!("{} to {}: {} bytes", opened.driver.name(), driver.name(), totals.guest_bytes))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [from, to] = args.as_slice() else {
        eprintln!("usage: toy_driver SOURCE TARGET");
        return ExitCode::from(2);
    };
    match convert(Path::new(from), Path::new(to)) {
        Ok(message) => {
            println!("{message}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::slab::SlabDriver;
    use imgtool_toolkit::CreateOptions;
    use imgtool_toolkit::conformance::{self, Content, Fill, Hostile, Image};
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    fn small() -> Image {
        let content = Content::zero().with(0..70_000, Fill::Random).with(190_000..200_000, Fill::Text);
        Image::disk("small", 200_000, content)
    }

    #[test]
    fn the_laws_hold() {
        conformance::all(&SlabDriver, &CreateOptions::default());
    }

    #[test]
    fn reports_failing_storage() {
        conformance::faults::all(&SlabDriver, &CreateOptions::default(), &small());
    }

    #[test]
    fn survives_hostile_bytes() {
        let image = conformance::make_bytes(&SlabDriver, &CreateOptions::default(), &small());
        let places = vec![0..8, 8..16];
        conformance::hostile_bytes_do_not_panic(
            &SlabDriver,
            &Hostile { image: &image, places, repair: &|_| () },
        );
    }

    #[test]
    fn converts_to_and_from_the_built_in_formats() {
        let directory = tempfile::tempdir().expect("a directory");
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/sparse.vma");
        let [slab, raw, direct] = ["a.slab", "a.raw", "b.raw"].map(|name| directory.path().join(name));
        assert_eq!(super::convert(&fixture, &slab).expect("to slab"), "vma to slab: 536871424 bytes");
        assert_eq!(super::convert(&slab, &raw).expect("from slab"), "slab to raw: 536871424 bytes");
        super::convert(&fixture, &direct).expect("without slab");
        let read = |path: &Path| std::fs::read(path).expect("read");
        assert!(read(&raw) == read(&direct), "content differs after the conversion through slab");
        let on_disk = std::fs::metadata(&slab).expect("the slab image").blocks() * 512;
        assert!(on_disk < 1 << 20, "zeros take no space: {on_disk} bytes");
    }
}
