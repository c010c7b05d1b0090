//! Selects the persistent bitmaps that a conversion copies.

use imgtool_core::error::escape_control;
use imgtool_core::{Error, Remedy, Result};

use crate::layout::Layout;
use crate::report::Note;
use crate::request::BrokenBitmaps;
use crate::sources::OpenSource;

/// Enters the bitmaps of the only source into the only output.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for several sources or outputs;
/// [`imgtool_core::ErrorKind::Unsupported`] if one of the formats has no bitmaps, or a bitmap can't be relied on.
pub(crate) fn copy(sources: &[OpenSource], broken: BrokenBitmaps, layout: &mut Layout) -> Result<()> {
    let ([source], [output]) = (sources, layout.outputs.as_mut_slice()) else {
        return Err(Error::usage("bitmaps are copied from one disk into one image"));
    };
    let image = &source.opened.image;
    let lacking = |name: &str| Error::unsupported(format!("{name} images have no persistent bitmaps"));
    let Some(bitmaps) = image.bitmaps() else {
        return Err(lacking(image.info().format).path(&source.opened.location));
    };
    if !output.format.writer.stores_bitmaps() {
        let name = output.format.driver.name();
        return Err(Error::unsupported(format!("the new {name} image can't have persistent bitmaps"))
            .path(output.destination.location())
            .hint("bitmaps go into qcow2 images of version 3"));
    }
    for bitmap in bitmaps {
        let name = escape_control(&bitmap.name);
        match &bitmap.fault {
            None => output.bitmaps.push(bitmap.clone()),
            Some(fault) if broken == BrokenBitmaps::Skip => {
                layout.notes.push(Note::Text(format!("bitmap '{name}' was left out: it {fault}")));
            }
            Some(fault) => {
                return Err(Error::unsupported(format!("bitmap '{name}' can't be copied: it {fault}"))
                    .path(&source.opened.location)
                    .remedied_by(Remedy::SkipBrokenBitmaps));
            }
        }
    }
    Ok(())
}
