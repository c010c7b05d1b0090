//! [`Inspector`], which judges the finished outputs of a run before they get their names.

use std::fmt;
use std::sync::Arc;

use imgtool_core::{ImageSource, Location, Result};

/// A finished output, opened for reading.
#[derive(Clone)]
#[non_exhaustive]
pub struct FinishedOutput {
    /// Final location.
    pub location: Location,
    /// Name of the compression of the whole file, if any.
    pub compression: Option<&'static str>,
    /// The image; `None` for an output in a pipe, which can't be read back.
    pub image: Option<Arc<dyn ImageSource>>,
}

impl fmt::Debug for FinishedOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FinishedOutput").field("location", &self.location).finish_non_exhaustive()
    }
}

/// Judges the finished outputs of a run.
pub trait Inspector: fmt::Debug + Sync {
    /// Judges all outputs of a run, in the order of the layout. Returns notes for the user.
    ///
    /// # Errors
    /// If the outputs must not get their names.
    fn inspect(&self, outputs: &[FinishedOutput]) -> Result<Vec<String>>;
}
