//! Core traits and types of imgtool: sources, sinks, drivers, extents and errors.
//!
//! * [`ImageSource`] is an open image, which many threads read at random or one thread reads in one pass;
//!   [`Disk`] is a handle to one of its devices.
//! * [`Consumer`] receives the pieces of a copy; [`ImageSink`] is a consumer that creates an image from them.
//! * [`Driver`] opens and creates images of one format; a [`Registry`] lists the drivers.
//! * [`Input`] and [`Output`] are the bytes of an image; a [`Location`] names their source or target.
//!
//! This crate implements no format and opens no files: `imgtool-storage` provides files, streams and outer
//! compression, and `imgtool-engine` copies content. There is no global state and no `unsafe` code.

pub mod base;
pub mod bitmap;
pub mod block_sink;
pub mod buffer;
pub mod cache;
pub mod candidates;
pub mod child_sink;
mod debug;
pub mod decoded;
pub mod device;
pub mod disk;
pub mod driver;
pub mod error;
pub mod extent;
pub mod external;
pub mod fingerprint;
pub mod incompressible;
pub mod input;
pub mod layered;
pub mod location;
pub mod losses;
pub mod machine;
pub mod manifest;
pub mod memory;
pub mod opener;
pub mod options;
pub mod output;
pub mod progress;
pub mod registry;
pub mod remedy;
mod secret;
pub mod sink;
mod snapshot;
pub mod source;
mod stack;
pub mod suggest;
pub mod sync;
pub mod table;
mod text;
pub mod unit_check;
pub mod zero;

pub use bitmap::{Bitmap, BitmapContent};
pub use buffer::{Buffer, BufferPool};
pub use cache::Cache;
pub use device::{Attachment, Device, DeviceId, DeviceKind, Lane, OutputId, SinkDevice, Slot};
pub use disk::{Disk, DiskReader};
pub use driver::{
    Archive, Capabilities, CheckReport, Confidence, Driver, ImageWriter, InPlace, Measure, MemberFormat,
    NamedFiles, OutputFactory, Repair, Resize,
};
pub use error::{Error, ErrorKind, Result, ResultExt};
pub use extent::{Extent, ExtentKind, ExtentList, MapExtent, MapPlace};
pub use external::{BackingName, ExternalOpener, Externals, OpenOptions};
pub use input::{FilePart, FileRun, Input, RandomInput, ReadAt, Stream};
pub use location::{Location, Url};
pub use losses::Losses;
pub use machine::Machine;
pub use manifest::Manifest;
pub use memory::{Lease, Memory, TableMemory};
pub use opener::UrlOpener;
pub use options::{Compress, CreateOptions, OptionKind, OptionSpec, OptionValues, parse_size};
pub use output::{Output, WriteAt};
pub use progress::{CancelToken, Copied, NoProgress, Progress};
pub use registry::Registry;
pub use remedy::Remedy;
pub use secret::{Secret, Secrets};
pub use sink::{Bytes, Consumer, FileWrite, Geometry, ImageSink, Part, Prepared, Sharing, WriteList};
pub use snapshot::SnapshotChoice;
pub use source::{
    Access, Doubt, Fact, FactScope, FileRange, ImageInfo, ImageSource, Loss, LossClass, Piece, RandomAccess,
    Reference, SinkPiece, StreamAccess, StreamOrder, StreamPart,
};
