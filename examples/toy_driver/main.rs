//! A custom driver alongside the built-in ones: converts from and to *slab*, a format invented for this
//! example.
//!
//! ```sh
//! cargo run --release --example toy_driver -- fixtures/sparse.vma target/sparse.slab
//! cargo run --release --example toy_driver -- target/sparse.slab target/sparse.qcow2
//! ```
//!
//! `slab.rs` is the driver. The tests below are enough to check it against the laws of the toolkit.
//! `docs/drivers.md` explains both.

use std::path::Path;
use std::process::ExitCode;

use imgtool::{Registry, Result};

mod slab;

/// Returns the built-in drivers and ours. Their order does not matter: raw is used only if no other format
/// matches.
fn registry() -> Registry {
    let mut registry = imgtool::registry();
    registry.register(slab::SlabDriver);
    registry
}

/// Converts `from` into the file `to`, whose extension selects the format.
fn convert(from: &Path, to: &Path) -> Result<String> {
    let report = imgtool::convert(from, to).drivers(registry()).overwrite().run()?;
    let made = &report.outputs[0];
    Ok(format!("{}: {} bytes as {}", made.location, made.virtual_size(), made.format))
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
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::slab::SlabDriver;
    use imgtool::Result;
    use imgtool::contracts::{
        Capabilities, Confidence, CreateOptions, Driver, ImageSource, Input, OpenOptions,
    };
    use imgtool_testing::conformance::{self, Content, Fill, Hostile, Image};
    use imgtool_testing::{assert_same, fixture, occupied, tempdir};
    use std::sync::Arc;

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

    /// Slab without a writer: everything that a read-only driver needs.
    struct ReadOnly;

    impl Driver for ReadOnly {
        fn name(&self) -> &'static str {
            "slab"
        }

        fn description(&self) -> &'static str {
            "slab image, read only"
        }

        fn extensions(&self) -> &'static [&'static str] {
            &["slab"]
        }

        fn capabilities(&self) -> Capabilities {
            Capabilities { read: true, size_multiple: 1, ..Capabilities::default() }
        }

        fn probe(&self, head: &[u8], len: Option<u64>) -> Option<Confidence> {
            SlabDriver.probe(head, len)
        }

        fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
            SlabDriver.open(input, options)
        }
    }

    #[test]
    fn the_laws_hold_for_a_read_only_driver() {
        let image = conformance::make_bytes(&SlabDriver, &CreateOptions::default(), &small());
        conformance::read_only(&ReadOnly, &[(&image, small())]);
    }

    #[test]
    fn converts_to_and_from_the_built_in_formats() {
        let directory = tempdir();
        let fixture = fixture("sparse.vma");
        let [slab, raw, direct] = ["a.slab", "a.raw", "b.raw"].map(|name| directory.path().join(name));
        let said = super::convert(&fixture, &slab).expect("to slab");
        assert_eq!(said, format!("{}: 536871424 bytes as slab", slab.display()));
        super::convert(&slab, &raw).expect("from slab");
        super::convert(&fixture, &direct).expect("without slab");
        assert_same(&raw, &direct, "through slab, and without");
        assert!(occupied(&slab) < 1 << 20, "zeros take no space: {} bytes", occupied(&slab));
    }
}
