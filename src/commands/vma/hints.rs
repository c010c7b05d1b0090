//! Wording of remedies for `imgtool vma`, which has few of the flags of the other commands.

use imgtool_core::Remedy;

use crate::args::VmaCommand;
use crate::remedy;

/// Returns the hint for a remedy. It names flags of `command`, or a whole command that has the flag.
pub(super) fn words(remedy: &Remedy, command: &VmaCommand) -> String {
    match (remedy, command) {
        (Remedy::AllowExternal { .. }, VmaCommand::Create(_))
        | (Remedy::ForceWrite(_), VmaCommand::Extract(_)) => remedy::words(remedy),
        (Remedy::NameFormat, VmaCommand::Create(_)) => {
            "name its format with -d format=FMT:[DEV=]PATH".to_owned()
        }
        (Remedy::NameFormat, VmaCommand::Extract(_)) => {
            "name its format in its line of the map, with format=FMT:".to_owned()
        }
        (Remedy::ReadAs { format, advice }, VmaCommand::Create(_)) => {
            format!("{advice}; -d format={format}:[DEV=]PATH reads it as a {format} disk")
        }
        (Remedy::ReadAs { format, advice }, VmaCommand::Extract(_)) => {
            format!("{advice}; format={format}: in its line of the map overwrites it as a {format} disk")
        }
        (Remedy::OverwriteAs { raw, image }, VmaCommand::Extract(_)) => {
            let into = image.map(|image| format!(", format={image}: writes into the image"));
            format!(
                "nothing was written; format={raw}: in its line of the map overwrites its bytes{}",
                into.unwrap_or_default()
            )
        }
        (Remedy::Salvage(advice), _) => {
            format!("{advice}; imgtool convert --salvage restores what is intact")
        }
        (Remedy::IgnoreTrailing, _) => {
            "every device is complete, so these are bytes after the end of the archive; \
             imgtool convert --ignore-trailing accepts them"
                .to_owned()
        }
        (Remedy::OpenAnyway(advice), _) => format!("{advice}; imgtool convert --force reads it as it is"),
        (Remedy::AllowMemory { bytes }, _) => {
            format!("imgtool convert --memory {}M allows more", bytes >> 20)
        }
        (Remedy::Overwrite, VmaCommand::Create(_)) => "choose another name".to_owned(),
        // `imgtool vma` has no flag for it.
        (Remedy::ShareSource(advice), _) => advice.to_string(),
        (other, _) => other.to_string(),
    }
}
