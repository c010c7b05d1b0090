//! [`ChosenChain`], the backing images that the user chose in place of those that an image names.

use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{
    Error, ExternalOpener, Externals, ImageSource, Input, Location, OpenOptions, Registry, Result, Secret,
    Secrets,
};
use imgtool_storage::Sharing;
use imgtool_storage::open::{Opening, open_shared};

use crate::blank::Blank;
use crate::open::{self, Opened};

/// Role of the files that the user can choose.
const ROLE: &str = "backing file";

/// A backing image that the user chose. The user named it, so it needs no permission; what it names itself does.
#[derive(Debug, Clone)]
pub struct ChosenImage {
    /// Location.
    pub location: Location,
    /// Format, if the user stated it; otherwise the image above may state it.
    pub format: Option<String>,
    /// Passphrase of this image and those below it, if it has one of its own; no other is tried then.
    pub secret: Option<Secret>,
}

/// The backing images that the user chose for an image. The default leaves them to the image.
#[derive(Debug, Clone, Default)]
pub struct ChosenChain {
    /// Backing images, the topmost first.
    pub images: Vec<ChosenImage>,
    /// True if the lowest image is read without the backing image that it may name. What it does not store itself
    /// reads as zeros.
    pub ends: bool,
}

impl ChosenChain {
    /// True if the image names its backing images itself.
    pub fn is_unset(&self) -> bool {
        self.images.is_empty() && !self.ends
    }
}

/// Returns options for an image over the `chosen` backing images.
pub fn options(registry: &Registry, chosen: &ChosenChain, options: &OpenOptions) -> OpenOptions {
    if chosen.is_unset() {
        return options.clone();
    }
    let mut images = chosen.images.iter().cloned();
    let opener = ChosenOpener {
        registry: registry.clone(),
        first: images.next(),
        rest: ChosenChain { images: images.collect(), ends: chosen.ends },
        others: options.externals.clone(),
        opened: Mutex::default(),
    };
    OpenOptions { externals: Externals::new(Arc::new(opener)), ..options.clone() }
}

/// Refuses the `chosen` backing images for an image that names none: it would be read without them.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] in this case.
pub fn check(opened: &Opened, chosen: &ChosenChain) -> Result<()> {
    let mut references = opened.image.info().references.iter();
    if chosen.images.is_empty() || references.any(|reference| reference.role == ROLE) {
        return Ok(());
    }
    Err(Error::usage("has no backing file, so none can be chosen for it").path(&opened.location))
}

/// Opens the chosen image for the backing file of one image, and leaves everything else to the opener of that image.
struct ChosenOpener {
    registry: Registry,
    /// The chosen image; `None` to read the image above without a backing image.
    first: Option<ChosenImage>,
    /// Images below the first.
    rest: ChosenChain,
    others: Externals,
    opened: Mutex<Vec<Opened>>,
}

impl ExternalOpener for ChosenOpener {
    fn open_image(
        &self,
        role: &str,
        name: &str,
        from: &Location,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        if role != ROLE {
            return self.others.open_image(role, name, from, format, options);
        }
        let Some(first) = &self.first else { return Ok(Arc::new(Blank::new("nothing", 0))) };
        let own = first.secret.clone().map(Secrets::from);
        let below = OpenOptions {
            secrets: own.unwrap_or_else(|| options.secrets.clone()),
            externals: self.others.clone(),
            snapshot: None,
            // Those of a backing image are not those of the image.
            bitmaps: false,
            ..options.clone()
        };
        let below = self::options(&self.registry, &self.rest, &below);
        let sharing = Sharing::forced(options.force_share);
        let input = open_shared(&first.location, Opening::Plain, &options.memory, sharing)?;
        let format = first.format.as_deref().or(format);
        let opened = open::open_image(&self.registry, input, format, &below)?;
        check(&opened, &self.rest)?;
        let image = Arc::clone(&opened.image);
        lock(&self.opened).push(opened);
        Ok(image)
    }

    fn open_file(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        self.others.open_file(role, name, from)
    }

    fn open_part(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        self.others.open_part(role, name, from)
    }

    fn candidates(
        &self,
        role: &str,
        identity: &str,
        from: &Location,
        extension: &str,
    ) -> Result<Vec<String>> {
        self.others.candidates(role, identity, from, extension)
    }

    fn open_member(
        &self,
        member: Input,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        self.others.open_member(member, format, options)
    }

    fn decompressed(&self, member: Input, compression: &str) -> Result<Input> {
        self.others.decompressed(member, compression)
    }

    fn saved(&self, stream: Input) -> Result<Input> {
        self.others.saved(stream)
    }

    fn image_opened(&self, image: &Location, id: (u64, u64)) {
        self.others.image_opened(image, id);
    }

    fn changes(&self) -> Vec<String> {
        let mut changes = self.others.changes();
        for change in lock(&self.opened).iter().flat_map(Opened::changes) {
            // The images share the opener of the files that they name.
            if !changes.contains(&change) {
                changes.push(change);
            }
        }
        changes
    }

    fn depth(&self) -> usize {
        self.others.depth()
    }
}
