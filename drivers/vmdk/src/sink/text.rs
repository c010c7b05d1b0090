//! The descriptor of a new image.

use std::fmt::Write;

use imgtool_core::fingerprint::Fingerprint;

use super::NewExtent;
use crate::options::{Subformat, VmdkOptions};

/// Type of the extents of a new image.
#[derive(Debug, Clone, Copy)]
pub(super) enum ExtentText {
    Flat,
    Sparse,
    Vmfs,
}

/// Returns the text of a descriptor, with the keys that VMware's open-vmdk writes.
pub(super) fn descriptor(
    options: &VmdkOptions,
    sectors: u64,
    extents: &[NewExtent],
    extent_type: ExtentText,
    fingerprint: &Fingerprint,
) -> String {
    let name = options.subformat.name();
    let is_single = matches!(options.subformat, Subformat::StreamOptimized | Subformat::MonolithicSparse);
    let id = fingerprint.guid(name, &[sectors, options.hardware.cast_unsigned()]).into_bytes();
    let (long, cid) = id.split_at(12);
    let mut cid = cid.iter().fold(0u32, |cid, byte| cid << 8 | u32::from(*byte));
    if cid >= u32::MAX - 1 {
        // VMware reserves the two largest: for "no parent", and for "never written".
        cid -= 2;
    }
    // Without it, VMware reads names of files in the code page of its host.
    let encoding = if is_single { "" } else { "encoding=\"UTF-8\"\n" };
    let mut text = format!(
        "# Disk DescriptorFile\nversion=1\n{encoding}CID={cid:08x}\nparentCID=ffffffff\n\
         createType=\"{name}\"\n\n# Extent description\n"
    );
    for extent in extents {
        let NewExtent { name, sectors } = extent;
        // Writing to a string does not fail.
        let _ = match extent_type {
            ExtentText::Flat => writeln!(text, "RW {sectors} FLAT \"{name}\" 0"),
            ExtentText::Sparse => writeln!(text, "RW {sectors} SPARSE \"{name}\""),
            ExtentText::Vmfs => writeln!(text, "RW {sectors} VMFS \"{name}\""),
        };
    }
    let long: String = long.iter().map(|byte| format!("{byte:02x}")).collect();
    let (heads, max_cylinders) = if options.adapter == "ide" { (16, 16_383) } else { (255, 65_535) };
    let cylinders = sectors.div_ceil(heads * 63).min(max_cylinders);
    let _ = write!(
        text,
        "\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"{}\"\nddb.encoding = \"UTF-8\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"63\"\nddb.longContentID = \"{long}{cid:08x}\"\n",
        options.adapter
    );
    if let Some(tools) = options.tools {
        let _ = writeln!(text, "ddb.toolsVersion = \"{tools}\"");
    }
    let _ = writeln!(text, "ddb.virtualHWVersion = \"{}\"", options.hardware);
    text
}
