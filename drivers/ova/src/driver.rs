//! The drivers: OVA and OVF packages, tar archives, and zip archives.

use std::sync::Arc;

use imgtool_core::{
    Archive, Capabilities, CheckReport, Confidence, CreateOptions, Driver, Error, ImageSource, ImageWriter,
    Input, MemberFormat, OpenOptions, OptionSpec, Result,
};

use crate::options::OPTIONS;
use crate::source::{PackageSource, begins_like_xml};
use crate::tar::{Kind, Walker, is_tar};
use crate::writer::{MEMBER, PackageWriter};
use crate::zip::is_zip;
use crate::{check, disk_archive, disks, member, stream};

/// Driver for packages of virtual machines: an OVF document and its files, in a tar archive or, only read, in
/// a directory.
#[derive(Debug, Clone, Copy, Default)]
pub struct OvaDriver;

/// Driver for disk images in a tar archive. A new one holds a single raw disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct TarDriver;

/// Read-only driver for disk images in a zip archive.
#[derive(Debug, Clone, Copy, Default)]
pub struct ZipDriver;

impl Driver for OvaDriver {
    fn name(&self) -> &'static str {
        crate::OVA
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["ovf"]
    }

    fn description(&self) -> &'static str {
        "OVA or OVF package: the disks of a virtual machine and its description"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["ova", "ovf"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: true,
            archive: Some(Archive { max_devices: disks::MAX_DISKS, attachments: false }),
            container: true,
            compression: true,
            size_multiple: 512,
            check: true,
            ..Capabilities::default()
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        (first_is_descriptor(head) || is_descriptor(head)).then_some(Confidence::Magic)
    }

    fn reads_stream(&self, head: &[u8]) -> bool {
        first_is_descriptor(head)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        if input.is_stream() {
            return stream::open(input, options);
        }
        Ok(Arc::new(PackageSource::open(crate::OVA, input, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(crate::OVA, input, options)
    }

    fn writer(&self, _options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Err(Error::unsupported("a package is made of disks, which another driver writes"))
    }

    fn member_format(&self) -> Option<MemberFormat> {
        Some(MEMBER)
    }

    fn container_writer(
        &self,
        options: &CreateOptions,
        member: Box<dyn ImageWriter>,
    ) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(PackageWriter::new(options, member)?))
    }
}

impl Driver for TarDriver {
    fn name(&self) -> &'static str {
        crate::TAR
    }

    fn description(&self) -> &'static str {
        "tar archive of disk images, such as the disk.raw of Google Compute Engine"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["tar", "tgz"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            write: true,
            stream_read: true,
            stream_write: true,
            stream_member: true,
            ..of_archives()
        }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        (is_tar(head) && !first_is_descriptor(head)).then_some(Confidence::Magic)
    }

    fn reads_stream(&self, head: &[u8]) -> bool {
        member::begins_with_disk(head)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        if input.is_stream() {
            return match &options.member {
                Some(wanted) => member::open(input, wanted, options),
                None => member::open_only(input, options),
            };
        }
        Ok(Arc::new(PackageSource::open(crate::TAR, input, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(crate::TAR, input, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        Ok(Box::new(disk_archive::DiskArchiveWriter::new(options)?))
    }
}

impl Driver for ZipDriver {
    fn name(&self) -> &'static str {
        crate::ZIP
    }

    fn description(&self) -> &'static str {
        "zip archive of disk images, stored or deflated"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["zip"]
    }

    fn capabilities(&self) -> Capabilities {
        of_archives()
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        is_zip(head).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        Ok(Arc::new(PackageSource::open(crate::ZIP, input, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(crate::ZIP, input, options)
    }
}

/// Returns the capabilities of the drivers for archives of disk images.
fn of_archives() -> Capabilities {
    Capabilities {
        read: true,
        archive: Some(Archive { max_devices: disks::MAX_DISKS, attachments: false }),
        container: true,
        size_multiple: 1,
        check: true,
        ..Capabilities::default()
    }
}

/// True if `head` begins a tar archive whose first file is a descriptor of a package, its manifest or
/// certificate.
fn first_is_descriptor(head: &[u8]) -> bool {
    if !is_tar(head) {
        return false;
    }
    let mut walker = Walker::new(head);
    // The content of a member may lie beyond the head.
    let first =
        std::iter::from_fn(|| walker.next().ok().flatten()).find(|entry| entry.kind != Kind::Directory);
    let name = first.map(|entry| entry.name.to_ascii_lowercase()).unwrap_or_default();
    [".ovf", ".mf", ".cert"].iter().any(|extension| name.ends_with(extension))
}

/// True if `head` begins an OVF document: XML with the element `Envelope` of one of the namespaces of OVF.
fn is_descriptor(head: &[u8]) -> bool {
    let text = String::from_utf8_lossy(head);
    let names_ovf = text.contains("schemas.dmtf.org/ovf/") || text.contains("www.vmware.com/schema/ovf");
    begins_like_xml(head) && text.contains("Envelope") && names_ovf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_known_by_their_namespace() {
        let ovf = "\u{feff}<?xml version='1.0'?>\n<ovf:Envelope xmlns:ovf='http://schemas.dmtf.org/ovf/envelope/1'>";
        assert_eq!(OvaDriver.probe(ovf.as_bytes(), None), Some(Confidence::Magic));
        for other in
            ["<?xml version='1.0'?><Envelope/>", "Envelope http://schemas.dmtf.org/ovf/envelope/1", ""]
        {
            assert_eq!(OvaDriver.probe(other.as_bytes(), None), None, "{other}");
        }
    }
}
