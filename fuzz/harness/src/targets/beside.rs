//! An opener that has one file: the parent of the image that a target reads.

use std::sync::Arc;

use imgtool_core::external::{ExternalOpener, refusal};
use imgtool_core::{Driver, Externals, ImageSource, Input, Location, OpenOptions, Result};

use super::by_position;
use crate::sparse::SparseFile;

/// Opens the same file for every name.
pub(super) struct OneFile<D> {
    pub(super) driver: D,
    pub(super) file: Arc<SparseFile>,
}

impl<D: Driver + 'static> OneFile<D> {
    /// Returns options for opening images beside the file.
    pub(super) fn options(self) -> OpenOptions {
        OpenOptions { externals: Externals::new(Arc::new(self)), ..OpenOptions::default() }
    }
}

impl<D: Driver> ExternalOpener for OneFile<D> {
    fn open_image(
        &self,
        _role: &str,
        _name: &str,
        _from: &Location,
        _format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        let options = OpenOptions { externals: Externals::default(), ..options.clone() };
        self.driver.open(by_position(&self.file), &options)
    }

    fn open_file(&self, _role: &str, _name: &str, _from: &Location) -> Result<Input> {
        Ok(by_position(&self.file))
    }

    fn candidates(&self, _: &str, _: &str, _: &Location, _: &str) -> Result<Vec<String>> {
        Ok(vec!["parent".to_owned()])
    }

    fn open_member(
        &self,
        member: Input,
        _format: Option<&str>,
        _options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        Err(refusal("member", "member", member.location()))
    }

    fn depth(&self) -> usize {
        0
    }
}
