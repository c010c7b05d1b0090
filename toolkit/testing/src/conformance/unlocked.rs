//! A driver that gives a passphrase to every image, so that the laws can be applied to encrypted ones.

use std::sync::Arc;

use imgtool_core::{
    Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSource, ImageWriter, Input,
    OpenOptions, OptionSpec, Result, Secret,
};

/// A driver whose images have a passphrase, which every call supplies.
#[derive(Debug, Clone, Copy)]
pub struct Unlocked<D>(pub D);

impl<D> Unlocked<D> {
    /// Returns the passphrase of all images.
    pub fn secret() -> Secret {
        Secret::new(b"a passphrase".to_vec())
    }

    fn opened(options: &OpenOptions) -> OpenOptions {
        OpenOptions { secrets: Self::secret().into(), ..options.clone() }
    }
}

impl<D: Driver> Driver for Unlocked<D> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn description(&self) -> &'static str {
        self.0.description()
    }

    fn extensions(&self) -> &'static [&'static str] {
        self.0.extensions()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn options(&self) -> &'static [OptionSpec] {
        self.0.options()
    }

    fn probe(&self, head: &[u8], len: Option<u64>) -> Option<Confidence> {
        self.0.probe(head, len)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        self.0.open(input, &Self::opened(options))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        self.0.check(input, &Self::opened(options))
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        self.0.writer(&CreateOptions { secret: Some(Self::secret()), ..options.clone() })
    }
}
