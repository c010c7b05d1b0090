//! The format-neutral core of imgtool: what a source, a sink and a driver are, and the pipeline
//! between them.
//!
//! * [`ImageSource`] is an opened image, read at random by many threads or in one pass.
//! * [`ImageSink`] is an image in the making: prepare (parallel), place (ordered), write (parallel).
//! * [`Driver`] opens and creates images of one format; a [`Registry`] holds the drivers.
//! * [`pipeline::copy`] moves content from a source to a sink.
//! * [`storage`] holds files, streams, outer compression and outputs that get their final name only
//!   when they are finished.
//!
//! [`Conversion`] is the usual conversion in one call, [`DeviceReader`] a disk as `Read` and `Seek`.
//!
//! The crate knows no format. There is no global state; everything can be cancelled.

pub mod buffer;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod convert;
pub mod device;
pub mod digest;
pub mod driver;
pub mod error;
pub mod extent;
pub mod external;
pub mod fanout;
pub mod losses;
pub mod packed;
pub mod pipeline;
pub mod progress;
pub mod reader;
pub mod registry;
pub mod sink;
pub mod source;
pub mod storage;
pub mod suggest;
pub mod zero;

pub use buffer::{Buffer, BufferPool};
pub use convert::Conversion;
pub use device::{Attachment, Device, DeviceId, DeviceKind, Manifest};
pub use driver::{
    Capabilities, CheckReport, Compress, Confidence, CreateOptions, Driver, Extras, Measure, OpenOptions,
    OptionSpec, parse_size,
};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use extent::{Extent, ExtentKind, ExtentList, MapExtent, MapPlace};
pub use external::{ExternalPolicy, Externals, Given};
pub use fanout::FanOut;
pub use losses::Losses;
pub use packed::{PackedSink, Packing};
pub use progress::{CancelToken, NoProgress, Progress};
pub use reader::DeviceReader;
pub use registry::{Opened, Registry};
pub use sink::{Bytes, FileWrite, Geometry, ImageSink, Part, Prepared, WriteList};
pub use source::{
    Access, Doubt, Fact, FactScope, FileRange, ImageInfo, ImageSource, Loss, Piece, RandomAccess, Reference,
    SequentialAccess,
};
pub use storage::{Compression, Input, Output, Outputs, RandomInput, Stream};

/// Its example is compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
