//! Wording of remedies for the command line: names the flags for the actions that the libraries suggest.

use imgtool_core::Remedy;

/// Returns the hint for a remedy.
pub fn words(remedy: &Remedy) -> String {
    match remedy {
        Remedy::Salvage(advice) => format!("{advice}; --salvage restores what is intact"),
        Remedy::IgnoreTrailing => {
            "every device is complete, so these are bytes after the end of the archive; --ignore-trailing accepts them"
                .to_owned()
        }
        Remedy::OpenAnyway(advice) => format!("{advice}, or read it as it is with 'convert --force'"),
        Remedy::SkipBrokenBitmaps => {
            "--skip-broken-bitmaps leaves it out; 'qemu-img bitmap --remove' deletes it".to_owned()
        }
        Remedy::ShareSource(advice) => format!("{advice}; -U reads it as it is, and may mix two states"),
        Remedy::Overwrite => "--force overwrites it; -n writes one disk into a raw, qcow2 or VHDX image".to_owned(),
        Remedy::ChooseDirectory { path } => {
            format!("for another machine choose another directory, such as {path}; --force overwrites this file")
        }
        Remedy::ReplaceImage => "leave out -n: --force replaces it by a new image".to_owned(),
        Remedy::Repair => "repair it first: imgtool check -r all".to_owned(),
        Remedy::DiscardData => "nothing was changed; --shrink cuts the data off".to_owned(),
        Remedy::WriteIntoDevice => {
            "name it as DEST, or for one disk with --target NAME=PATH, in a format that can be written there".to_owned()
        }
        Remedy::ForceWrite(advice) => format!("nothing was written; {advice}; --force writes anyway"),
        Remedy::NameTarget => {
            "remove the link, or name the file that it leads to with --target NAME=PATH".to_owned()
        }
        Remedy::AllowExternal { .. } => {
            "if you trust the image: --allow-external PATH for that file, or --allow-external chain for files in the image's directory"
                .to_owned()
        }
        Remedy::NameFormat => "name its format with -f".to_owned(),
        Remedy::NameTargetFormat { advice } => {
            format!("-O FMT (create: -f FMT) sets the format, whatever the name of the file; {advice}")
        }
        Remedy::ReadAs { format, advice } => format!("{advice}; -f {format} reads it as a {format} disk"),
        Remedy::ChooseFormat { formats: [one, other] } => {
            format!("-f {one} reads it as a {one} image, -f {other} as a {other} disk")
        }
        Remedy::OverwriteAs { raw, image } => {
            let into = image.map(|image| format!(", -O {image} writes into the image")).unwrap_or_default();
            format!("nothing was written; -O {raw} (--target NAME=PATH,format={raw}) overwrites its bytes{into}")
        }
        Remedy::SetOption(option) => match option.strip_prefix("backing_fmt=") {
            Some(format) => format!("name its format with -F {format}"),
            None => format!("use -o {option}"),
        },
        Remedy::ListOptions { format, advice } => {
            let end = if advice.ends_with('?') { " " } else { "; " };
            format!("{advice}{end}'-o help' explains all options of {format}")
        }
        Remedy::SelectDisk { names, advice } => format!("{advice}, or take one with --disk: {names}"),
        Remedy::ChooseMember { names } => format!("take one with --member: {names}"),
        Remedy::LeaveOutMember => "leave out --member: it names a file in a tar, OVA or zip archive".to_owned(),
        Remedy::JoinSources => {
            "a directory (a name that ends in '/') takes an image for each, an archive all of them; --join makes one disk of them, one after the other"
                .to_owned()
        }
        Remedy::NameDestination => {
            "give DEST, or a --target for each device; --disk takes only some of them".to_owned()
        }
        Remedy::NameDiskFormat => {
            "name the format with --to, or with --target NAME=PATH,format=FMT".to_owned()
        }
        Remedy::LeaveOutCompression => {
            "leave out -c; a DEST that ends in .zst or .gz compresses the whole file".to_owned()
        }
        Remedy::ForceFront => {
            "nothing was written; --force writes the disk to its front and leaves the rest alone".to_owned()
        }
        Remedy::AcceptLarger(advice) => format!("{advice}; --force accepts a larger target"),
        Remedy::GiveSecret => {
            "give the passphrase with --secret file=PATH, env=NAME or fd=N".to_owned()
        }
        Remedy::GiveOneSecret => {
            "give one --secret, or state its own for each image: --object secret,id=s0,file=PATH --image-opts driver=qcow2,encrypt.key-secret=s0,file.filename=IMAGE"
                .to_owned()
        }
        Remedy::GiveSecretOrReadAs { format } => format!(
            "give the passphrase with --secret file=PATH, env=NAME or fd=N; -f {format} copies the encrypted bytes as they are"
        ),
        Remedy::GiveTargetSecret => {
            "give the passphrase of the new image with --target-secret file=PATH, env=NAME or fd=N; a single --secret counts as well"
                .to_owned()
        }
        Remedy::AllowMemory { bytes } => format!("allow more with --memory {}M", bytes >> 20),
        Remedy::SendHeaders => {
            "--header @FILE sends the headers in FILE, such as 'Authorization: Bearer TOKEN'".to_owned()
        }
        Remedy::TrustAuthority => {
            "--cacert FILE trusts the authority whose certificate is in FILE".to_owned()
        }
        Remedy::ReadAll => "info --read-all reads it to its end".to_owned(),
        other => other.to_string(),
    }
}
