//! [`Remedy`], an action by which a user can resolve an error.
//!
//! A library does not know how a program offers an action like overwriting: as a flag, a button or a
//! parameter. So an error carries the action, and each program words it. `Display` uses words that fit every
//! program.

use std::borrow::Cow;
use std::fmt;

/// An action by which a user can resolve an error.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// Advice that fits every program ("free some space, or choose another directory").
    Advice(Cow<'static, str>),
    /// Open the damaged file for salvage ([`crate::OpenOptions::salvage`]), which restores its intact parts.
    /// The advice is the better alternative ("copy it again, or use a backup").
    Salvage(Cow<'static, str>),
    /// Accept bytes after the end of an archive ([`crate::OpenOptions::ignore_trailing`]).
    IgnoreTrailing,
    /// Open an image that is marked as unsafe ([`crate::OpenOptions::force`]). The advice is the safer
    /// alternative.
    OpenAnyway(Cow<'static, str>),
    /// Leave out bitmaps that can't be relied on.
    SkipBrokenBitmaps,
    /// Read a source that another program may write ([`crate::OpenOptions::force_share`]). The advice is the
    /// safer alternative.
    ShareSource(Cow<'static, str>),
    /// Replace the file that already exists.
    Overwrite,
    /// Choose another directory for the machine: replacing the file that already exists may hit a disk of another one.
    ChooseDirectory {
        /// Path of a directory that does not exist.
        path: String,
    },
    /// Replace the existing image by a new one, instead of writing into it.
    ReplaceImage,
    /// Repair the image before it is changed.
    Repair,
    /// Permit that data is cut off.
    DiscardData,
    /// Write into the block device that already exists.
    WriteIntoDevice,
    /// Write although the target is in use, or its size is unexpected. The advice is the safer alternative.
    ForceWrite(Cow<'static, str>),
    /// Remove the symbolic link, or name its target as the output.
    NameTarget,
    /// Allow the image to open an external file.
    AllowExternal {
        /// Name in the image; untrusted.
        name: String,
    },
    /// State the format of the image.
    NameFormat,
    /// State the format of the output, whatever its name.
    NameTargetFormat {
        /// Text that lists the formats.
        advice: String,
    },
    /// State this format, in which any content is legal.
    ReadAs {
        /// Name of the format.
        format: &'static str,
        /// Alternative, or likely cause of the error.
        advice: Cow<'static, str>,
    },
    /// State the format of the image: the content fits both.
    ChooseFormat {
        /// Names of the formats, the likelier one first.
        formats: [&'static str; 2],
    },
    /// State the format of the existing target: its content is not that of a raw disk.
    OverwriteAs {
        /// Name of the raw format, in which the bytes of the target are overwritten.
        raw: &'static str,
        /// Name of the format of the image, if it can be written into.
        image: Option<&'static str>,
    },
    /// Set this option of the format (`cluster_size=131072`).
    SetOption(String),
    /// List the options of a format.
    ListOptions {
        /// Name of the format.
        format: String,
        /// Text that suggests the nearest option or lists all of them.
        advice: String,
    },
    /// Select one of the disks.
    SelectDisk {
        /// Names of the disks; untrusted.
        names: String,
        /// Alternative that uses all disks.
        advice: Cow<'static, str>,
    },
    /// Choose one of the files in the archive ([`crate::OpenOptions::member`]).
    ChooseMember {
        /// Quoted names of the first files; untrusted.
        names: String,
    },
    /// Leave out the choice of a file in an archive.
    LeaveOutMember,
    /// Make an image of each source, an archive of all, or join them to one disk.
    JoinSources,
    /// State a destination for every disk, or select fewer.
    NameDestination,
    /// State the format of one disk's target.
    NameDiskFormat,
    /// Do not request compression inside the format, which does not support it.
    LeaveOutCompression,
    /// Force writing the disk to the front of a much larger target.
    ForceFront,
    /// Accept that a target which was already overwritten is much larger than the disk. The advice is the
    /// safer alternative.
    AcceptLarger(Cow<'static, str>),
    /// Give the device another name.
    RenameDevice,
    /// Read the stream to its end to learn the missing facts.
    ReadAll,
    /// Send headers with the credentials that a server demands.
    SendHeaders,
    /// Trust the authority that issued a server's certificate.
    TrustAuthority,
    /// Give the passphrase of the encrypted image ([`crate::OpenOptions::secrets`]).
    GiveSecret,
    /// Give only one passphrase, or state the one of this image: the image can't tell which is right.
    GiveOneSecret,
    /// Give the passphrase of the container, or state this format, in which the encrypted bytes are copied as
    /// they are.
    GiveSecretOrReadAs {
        /// Name of the format.
        format: &'static str,
    },
    /// Give a passphrase for the new image ([`crate::CreateOptions::secret`]).
    GiveTargetSecret,
    /// Allow this much memory ([`crate::Memory::new`]).
    AllowMemory {
        /// Limit in bytes that suffices for the refused step; a multiple of 1 MiB.
        bytes: u64,
    },
}

impl From<String> for Remedy {
    fn from(advice: String) -> Self {
        Self::Advice(advice.into())
    }
}

impl From<&'static str> for Remedy {
    fn from(advice: &'static str) -> Self {
        Self::Advice(advice.into())
    }
}

/// Words the remedy for any program, without command-line flags.
impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Advice(advice) => f.write_str(advice),
            Self::Salvage(advice) => write!(f, "{advice}; opening it for salvage restores what is intact"),
            Self::IgnoreTrailing => {
                f.write_str("every device is complete: allow trailing bytes to ignore what follows")
            }
            Self::OpenAnyway(advice) => write!(f, "{advice}, or force reading it as it is"),
            Self::SkipBrokenBitmaps => f.write_str("leave out broken bitmaps, or remove this one"),
            Self::ShareSource(advice) => {
                write!(f, "{advice}; forcing shared access reads it, and may mix two states")
            }
            Self::Overwrite => f.write_str("allow overwriting, or choose another name"),
            Self::ChooseDirectory { path } => {
                write!(f, "allow overwriting, or, for another machine, choose another directory, such as {path}")
            }
            Self::ReplaceImage => f.write_str("make a new image in its place, or choose another name"),
            Self::Repair => f.write_str("repair the image first"),
            Self::DiscardData => f.write_str("nothing was changed; permit the loss of this data"),
            Self::WriteIntoDevice => f.write_str("write into the device in place"),
            Self::ForceWrite(advice) => write!(f, "nothing was written; {advice}; a forced write goes ahead"),
            Self::NameTarget => f.write_str("remove the link, or name the file that it leads to"),
            Self::AllowExternal { .. } => {
                f.write_str("if you trust the image, allow this file, or all files in the image's directory")
            }
            Self::NameFormat => f.write_str("state its format"),
            Self::NameTargetFormat { advice } => write!(f, "state the format of the output; {advice}"),
            Self::ReadAs { format, advice } => {
                write!(f, "{advice}; stating the format {format} reads it as a {format} disk")
            }
            Self::ChooseFormat { formats: [one, other] } => {
                write!(f, "state its format: {one}, or {other} if a guest has written these bytes")
            }
            Self::OverwriteAs { raw, image } => {
                write!(f, "nothing was written; stating the format {raw} overwrites its bytes")?;
                image.map_or(Ok(()), |image| write!(f, ", {image} writes into the image"))
            }
            Self::SetOption(option) => write!(f, "set the option {option}"),
            Self::ListOptions { advice, .. } => f.write_str(advice),
            Self::SelectDisk { names, advice } => write!(f, "{advice}, or select one of {names}"),
            Self::ChooseMember { names } => write!(f, "choose one of the files in it: {names}"),
            Self::LeaveOutMember => f.write_str("choose no file: the image is no archive of images"),
            Self::JoinSources => f.write_str(
                "a directory (a name that ends in '/') takes an image for each, an archive all of them; or join them to one disk",
            ),
            Self::NameDestination => {
                f.write_str("name a destination, or a target for each disk; or select only some of them")
            }
            Self::NameDiskFormat => f.write_str("state the format of the target"),
            Self::LeaveOutCompression => f.write_str(
                "leave out the compression; a name that ends in .zst or .gz compresses the whole file",
            ),
            Self::ForceFront => f.write_str(
                "nothing was written; a forced write fills the front of the target and leaves the rest alone",
            ),
            Self::AcceptLarger(advice) => {
                write!(f, "{advice}, or force the write to accept the larger target")
            }
            Self::RenameDevice => f.write_str("give the device another name"),
            Self::SendHeaders => f.write_str("send headers with the credentials that the server demands"),
            Self::TrustAuthority => {
                f.write_str("if you trust the authority that issued the server's certificate, name its own one")
            }
            Self::ReadAll => f.write_str("read the stream to its end"),
            Self::GiveSecret => f.write_str("give the passphrase"),
            Self::GiveOneSecret => f.write_str("give only the passphrase of this image"),
            Self::GiveSecretOrReadAs { format } => {
                write!(
                    f,
                    "give the passphrase; stating the format {format} copies the encrypted bytes as they are"
                )
            }
            Self::GiveTargetSecret => f.write_str("give a passphrase for the new image"),
            Self::AllowMemory { bytes } => write!(f, "allow {} MiB of memory", bytes >> 20),
        }
    }
}
