//! The descriptor of a new image.

use std::fmt::Write;

use imgtool_core::fingerprint::Fingerprint;

use super::{NewExtent, NewImage};
use crate::options::Subformat;

/// Type of the extents of a new image.
#[derive(Debug, Clone, Copy)]
pub(super) enum ExtentText {
    Flat,
    Sparse,
    Vmfs,
}

/// Returns the text of a descriptor, with the keys that VMware's open-vmdk writes.
pub(super) fn descriptor(image: &NewImage, extent_type: ExtentText, fingerprint: &Fingerprint) -> String {
    let NewImage { options, sectors, extents, parent, .. } = image;
    let name = options.subformat.name();
    let is_single = matches!(options.subformat, Subformat::StreamOptimized | Subformat::MonolithicSparse);
    let mut parameters = vec![*sectors, options.hardware.cast_unsigned()];
    parameters.extend(parent.as_ref().map(|parent| u64::from(parent.cid)));
    let id = fingerprint.guid(name, &parameters).into_bytes();
    let (long, cid) = id.split_at(12);
    let mut cid = cid.iter().fold(0u32, |cid, byte| cid << 8 | u32::from(*byte));
    if cid >= u32::MAX - 1 {
        // VMware reserves the two largest: for "no parent", and for "never written".
        cid -= 2;
    }
    // Without it, VMware reads names of files in the code page of its host.
    let encoding = if is_single { "" } else { "encoding=\"UTF-8\"\n" };
    let parent_cid = parent.as_ref().map_or(u32::MAX, |parent| parent.cid);
    let mut text = format!(
        "# Disk DescriptorFile\nversion=1\n{encoding}CID={cid:08x}\nparentCID={parent_cid:08x}\n\
         createType=\"{name}\"\n"
    );
    if let Some(parent) = parent {
        let _ = writeln!(text, "parentFileNameHint=\"{}\"", parent.hint);
    }
    text.push_str("\n# Extent description\n");
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
