//! `Debug` for the trait objects of this crate, so that types containing them can derive it.

use std::fmt;

use crate::driver::{Driver, ImageWriter};
use crate::input::{Decode, ReadAt};
use crate::output::WriteAt;
use crate::progress::Progress;
use crate::sink::{Consumer, ImageSink};
use crate::source::{ImageSource, RandomAccess, StreamAccess};

impl fmt::Debug for dyn Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver({})", self.name())
    }
}

impl fmt::Debug for dyn ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageSource").field("info", self.info()).finish_non_exhaustive()
    }
}

macro_rules! name_only {
    ($($name:ident),*) => {$(
        impl fmt::Debug for dyn $name + '_ {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    )*};
}

name_only!(Consumer, Decode, ImageSink, ImageWriter, Progress, RandomAccess, ReadAt, StreamAccess, WriteAt);
