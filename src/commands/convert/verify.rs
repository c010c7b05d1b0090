//! `--verify`: reads every finished output back, through its driver, before it gets its name.
//!
//! The content was digested on its way from the source to the sink; the same digest of what the
//! output holds must be equal. That catches what a disk, a cable, a file system or our own writer
//! changed in between.

use imgtool_toolkit::digest::{ContentDigest, digest_source};
use imgtool_toolkit::{
    CancelToken, DeviceId, Driver, Error, NoProgress, OpenOptions, Output, Result, ResultExt,
};

/// An output to be read back.
pub struct Written<'a> {
    /// Its driver.
    pub driver: &'a dyn Driver,
    /// Where it is.
    pub output: &'a Output,
    /// It is compressed as a whole.
    pub packed: bool,
    /// The sink's numbers of its devices, in their order, and their names.
    pub devices: Vec<(DeviceId, &'a str)>,
}

impl Written<'_> {
    /// Compares what the output holds with what went into the sink.
    ///
    /// # Errors
    /// [`imgtool_toolkit::ErrorKind::Corrupt`] when they differ; whatever reading brings.
    pub fn check(
        &self,
        expected: &ContentDigest,
        options: &OpenOptions,
        threads: usize,
        cancel: CancelToken,
    ) -> Result<()> {
        self.compare(expected, options, threads, cancel).in_file(self.output.path())
    }

    fn compare(
        &self,
        expected: &ContentDigest,
        options: &OpenOptions,
        threads: usize,
        cancel: CancelToken,
    ) -> Result<()> {
        let input = self.output.reopen()?;
        let input = if self.packed { input.decompressed()? } else { input };
        let mut image = self.driver.open(input, options)?;
        let found: Vec<DeviceId> = image.info().devices.iter().map(|device| device.id).collect();
        if found.len() != self.devices.len() {
            return Err(differs(format!("it holds {} devices, not {}", found.len(), self.devices.len())));
        }
        let actual = digest_source(&mut *image, threads, &NoProgress, cancel)?;
        for (&(number, name), found) in self.devices.iter().zip(found) {
            if expected.of(number) != actual.of(found) {
                return Err(differs("its content is not what was written".to_owned()).device(name));
            }
        }
        Ok(())
    }
}

fn differs(what: String) -> Error {
    Error::corrupt(format!("reading the finished output back failed: {what}"))
        .hint("nothing was left behind; check the disk and the memory of this machine, then try again")
}
