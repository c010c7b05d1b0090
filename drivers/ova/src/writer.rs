//! [`PackageWriter`], which makes packages of streamOptimized VMDK disks. The caller makes the
//! writer of the disks: this driver knows their format by its name alone.

use std::ops::Range;

use imgtool_core::machine::{ControllerModel, Machine};
use imgtool_core::{
    Access, CreateOptions, Device, DeviceId, DeviceKind, Error, Extent, ImageInfo, ImageSink, ImageSource,
    ImageWriter, Location, Manifest, Measure, MemberFormat, Output, OutputFactory, RandomAccess, Remedy,
    Result, TableMemory,
};

use crate::disks::MAX_DISKS;
use crate::options::OvaOptions;
use crate::sink::{NewMember, NewPackage, PackageSink};
use crate::source::is_descriptor_name;
use crate::tar::BLOCK;

/// Format of the disks.
pub(crate) const MEMBER: MemberFormat =
    MemberFormat { name: "vmdk", options: &[("subformat", "streamOptimized")] };

/// Address of the specification of that variant. ESXi refuses it without the part behind `#`.
const MEMBER_URI: &str = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

/// Maximum length of a package's name in bytes: the names of its files end in `-disk254.vmdk`, and have at
/// most [`crate::tar::write::MAX_NEW_NAME`].
const MAX_NAME: usize = 80;

/// Number of bytes of a package besides its disks: descriptor, manifest, and headers. Our bound for the
/// prediction.
const OVERHEAD: u64 = 64 << 10;

/// Writer of packages.
pub(crate) struct PackageWriter {
    options: OvaOptions,
    member: Box<dyn ImageWriter>,
}

impl PackageWriter {
    /// Parses the options. `member` writes the disks.
    pub(crate) fn new(options: &CreateOptions, member: Box<dyn ImageWriter>) -> Result<Self> {
        Ok(Self { options: OvaOptions::parse(options)?, member })
    }
}

/// Returns a manifest of one device.
fn of_device(device: &Device, manifest: &Manifest, count: usize) -> Manifest {
    let tables = manifest.tables.map(|tables| tables / (count as u64).max(1));
    Manifest { devices: vec![Device { id: DeviceId(0), ..device.clone() }], tables, ..Manifest::default() }
}

/// Refuses what a package can't contain.
fn check(manifest: &Manifest) -> Result<()> {
    if let Some(state) = manifest.devices.iter().find(|device| device.kind == DeviceKind::VmState) {
        let disks = manifest.devices.iter().filter(|device| device.kind == DeviceKind::Disk);
        let names: Vec<&str> = disks.map(|device| device.name.as_str()).collect();
        return Err(Error::unsupported("an OVA does not hold the state of a running machine")
            .device(&*state.name)
            .remedied_by(Remedy::SelectDisk {
                names: names.join(", "),
                advice: "make a VMA archive".into(),
            }));
    }
    if manifest.devices.is_empty() || manifest.devices.len() > MAX_DISKS as usize {
        return Err(Error::unsupported(format!(
            "a package holds 1 to {MAX_DISKS} disks, not {}",
            manifest.devices.len()
        )));
    }
    Ok(())
}

/// Returns the name of the package at `location`: its file name without `.ova`, of characters that all
/// importers take.
fn package_name(location: &Location) -> String {
    let name = location.file_name().unwrap_or_default();
    let stem = name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).map_or(&*name, |(stem, _)| stem);
    let portable = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = stem.chars().map(portable).take(MAX_NAME).collect();
    if name.trim_matches(['_', '.', '-']).is_empty() { "vm".to_owned() } else { name }
}

/// Refuses the name of a descriptor for an archive: importers go by the extension, and would take the archive
/// for XML.
fn refuse_bare_descriptor(location: &Location) -> Result<()> {
    let name = location.file_name().unwrap_or_default();
    if !is_descriptor_name(&name) {
        return Ok(());
    }
    Err(Error::unsupported("a package is written as one archive, not as a descriptor with files beside it")
        .path(location)
        .hint("give a name that ends in .ova; tar -xf unpacks it into a descriptor and its files"))
}

/// Output of a disk inside of a package.
struct MemberOutput(Output);

impl OutputFactory for MemberOutput {
    fn main(&mut self) -> Result<Output> {
        Ok(self.0.clone())
    }

    fn beside(&mut self, name: &str) -> Result<Output> {
        Err(Error::unsupported(format!("a disk in a package has no other file '{name}'")))
    }
}

impl ImageWriter for PackageWriter {
    fn writes_stream(&self) -> bool {
        false
    }

    fn needs_guest_order(&self) -> bool {
        true
    }

    fn tables(&self, manifest: &Manifest) -> TableMemory {
        let count = manifest.devices.len();
        let tables =
            manifest.devices.iter().map(|device| self.member.tables(&of_device(device, manifest, count)));
        tables.fold(TableMemory::default(), |sum, one| TableMemory {
            least: sum.least.saturating_add(one.least),
            most: sum.most.saturating_add(one.most),
        })
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let mut sum = Measure { required: OVERHEAD, fully_allocated: OVERHEAD, ..Measure::default() };
        for device in &source.info().devices {
            let one = self.member.measure(&OneDevice::new(source, device))?;
            let padded = |len: u64| len.next_multiple_of(BLOCK as u64).saturating_add(BLOCK as u64);
            sum.required = sum.required.saturating_add(padded(one.required));
            sum.fully_allocated = sum.fully_allocated.saturating_add(padded(one.fully_allocated));
            sum.occupied = sum.occupied.saturating_add(one.occupied);
        }
        Ok(sum)
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        check(manifest)?;
        let output = outputs.main()?;
        refuse_bare_descriptor(output.location())?;
        if output.is_stream() {
            return Err(Error::unsupported("a package can't be written to a stream")
                .path(output.location())
                .hint("its descriptor comes first and states the lengths of its disks: give a file name"));
        }
        let name = package_name(output.location());
        let count = manifest.devices.len();
        let mut members = Vec::new();
        for (number, device) in (1..).zip(&manifest.devices) {
            let file = format!("{name}-disk{number}.vmdk");
            let capacity = device.size.checked_next_multiple_of(self.options.align).unwrap_or(u64::MAX);
            let mut inner = MemberOutput(Output::framed(file.as_str()));
            let sink = self.member.create(&mut inner, &of_device(device, manifest, count));
            let sink = sink.map_err(|e| e.device(&*device.name))?;
            members.push(NewMember { file, device: device.name.clone(), capacity, sink });
        }
        let devices = manifest.devices.iter().map(|device| device.name.as_str());
        let machine = match &manifest.machine {
            Some(machine) => (**machine).clone(),
            None => Machine::of_disks(&name, ControllerModel::LsiLogic, devices),
        };
        let package = NewPackage { name, machine, format: MEMBER_URI, options: self.options, members };
        Ok(Box::new(PackageSink::new(output, package)?))
    }
}

/// One device of an image, as an image of its own.
struct OneDevice<'a> {
    source: &'a dyn ImageSource,
    device: DeviceId,
    info: ImageInfo,
}

impl<'a> OneDevice<'a> {
    fn new(source: &'a dyn ImageSource, device: &Device) -> Self {
        let info = ImageInfo { devices: vec![device.clone()], ..ImageInfo::default() };
        Self { source, device: device.id, info }
    }

    fn random(&self) -> Result<&dyn RandomAccess> {
        let random = self.source.access().random();
        random.ok_or_else(|| Error::unsupported("a stream can't be measured").hint("save it to a file first"))
    }
}

impl ImageSource for OneDevice<'_> {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        match self.source.access() {
            Access::Random(_) => Access::Random(self),
            stream => stream,
        }
    }
}

impl RandomAccess for OneDevice<'_> {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.random()?.extents(self.device, range)
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.random()?.read_at(self.device, buf, guest_offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_after_their_files() {
        for (file, name) in [
            ("a/vm.ova", "vm"),
            ("web server (1).ova", "web_server__1_"),
            ("vm.1.ova", "vm.1"),
            ("ü.ova", "vm"),
            ("vm", "vm"),
        ] {
            assert_eq!(package_name(&Location::from(file)), name, "{file}");
        }
        assert_eq!(package_name(&Location::from(format!("{}.ova", "a".repeat(200)))).len(), MAX_NAME);
    }
}
