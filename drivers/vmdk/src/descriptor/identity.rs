//! Identifiers of an image and of its parent.

use std::fmt;

use imgtool_core::{Error, Remedy, Result};
use uuid::Uuid;

use super::{Descriptor, NO_PARENT, shorten};

/// UUIDs that VirtualBox stores. It names no parent, and states no content identifier of one, but these.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Uuids {
    /// UUID of the image.
    pub(crate) image: Option<Uuid>,
    /// UUID of its content.
    pub(crate) modification: Option<Uuid>,
    /// UUID of the parent.
    pub(crate) parent: Option<Uuid>,
    /// UUID of the parent's content at the time when the image was made.
    pub(crate) parent_modification: Option<Uuid>,
}

impl Uuids {
    /// Sets the UUID of the setting `key`; a nil one means that there is none. Ignores other settings, and text that
    /// is no UUID unless it concerns the parent.
    ///
    /// # Errors
    /// `Malformed` for a parent's UUID that is none, and for one that is set twice.
    pub(super) fn set(&mut self, key: &str, value: &str, on_line: &dyn Fn(String) -> String) -> Result<()> {
        let (field, is_parent) = match key {
            "ddb.uuid.image" => (&mut self.image, false),
            "ddb.uuid.modification" => (&mut self.modification, false),
            "ddb.uuid.parent" => (&mut self.parent, true),
            "ddb.uuid.parentmodification" => (&mut self.parent_modification, true),
            _ => return Ok(()),
        };
        let uuid = match Uuid::try_parse(value) {
            Ok(uuid) => Some(uuid).filter(|uuid| !uuid.is_nil()),
            Err(_) if is_parent && !value.is_empty() => {
                return Err(Error::malformed(on_line(format!(
                    "has the UUID '{}' of a parent, which is not a UUID",
                    shorten(value)
                ))));
            }
            Err(_) => None,
        };
        if field.is_some() && *field != uuid {
            return Err(Error::malformed(on_line(format!("sets {key} a second time"))));
        }
        *field = uuid;
        Ok(())
    }
}

/// Identifier that the parent of an image must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ParentId {
    /// Content identifier.
    Cid(u32),
    /// UUIDs of the parent and, unless the image states none, of its content.
    Uuid { image: Uuid, content: Option<Uuid> },
}

impl fmt::Display for ParentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cid(cid) => write!(f, "{cid:08x}"),
            Self::Uuid { image, .. } => write!(f, "{{{image}}}"),
        }
    }
}

impl Descriptor {
    /// True if what the image does not store is in a parent.
    pub(crate) fn is_child(&self) -> bool {
        self.uuids.parent.is_some() || self.parent_cid.is_some_and(|cid| cid != NO_PARENT)
    }

    /// Returns the name of the parent, if there is one.
    pub(crate) fn hint(&self) -> Option<&str> {
        self.parent_hint.as_deref().filter(|hint| !hint.is_empty())
    }

    /// Returns the identifier that the parent must have; `None` if there is no parent. Of a parent that the image
    /// names, the content identifier counts, which VMware and QEMU compare.
    pub(crate) fn parent_id(&self) -> Option<ParentId> {
        let cid = self.parent_cid.filter(|cid| *cid != NO_PARENT).map(ParentId::Cid);
        let content = self.uuids.parent_modification;
        let uuid = self.uuids.parent.map(|image| ParentId::Uuid { image, content });
        if self.hint().is_some() { cid.or(uuid) } else { uuid.or(cid) }
    }

    /// Returns the error for a descriptor that names a parent, but says that there is none.
    pub(crate) fn contradiction(&self) -> Option<Error> {
        let hint = self.hint().filter(|_| !self.is_child())?;
        Some(
            Error::malformed(format!(
                "the descriptor names a parent, '{}', but says that there is none (parentCID is ffffffff)",
                shorten(hint)
            ))
            .remedied_by(Remedy::Salvage(
                "if the disk has no parent, remove parentFileNameHint from the descriptor of a copy".into(),
            )),
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const UUID: &str = "5c2a1d1b-5b5b-4b86-9a7e-6ff4b0f1a001";

    fn id(lines: &str) -> Option<String> {
        Descriptor::parse(lines.as_bytes()).unwrap().parent_id().map(|id| id.to_string())
    }

    #[test]
    fn a_child_names_its_parent_or_identifies_it() {
        let uuid = format!("ddb.uuid.parent=\"{UUID}\"");
        let braced = Some(format!("{{{UUID}}}"));
        assert_eq!(id("parentCID=ffffffff\nddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\""), None);
        assert_eq!(id(&format!("parentCID=ffffffff\n{uuid}")), braced);
        assert_eq!(id(&format!("parentCID=7\n{uuid}")), braced);
        assert_eq!(id(&format!("parentCID=7\nparentFileNameHint=\"a\"\n{uuid}")).unwrap(), "00000007");
        assert_eq!(id("parentCID=7").unwrap(), "00000007");
    }

    #[test]
    fn refuses_a_parent_that_is_no_uuid() {
        let parse = |lines: &str| Descriptor::parse(lines.as_bytes()).map(|_| ());
        for line in ["ddb.uuid.parent=\"base\"", "ddb.uuid.parentmodification=\"{\""] {
            assert!(parse(line).unwrap_err().to_string().contains("not a UUID"), "{line}");
        }
        parse("ddb.uuid.image=\"60 00 c2 9a\"").unwrap();
        let twice = format!("ddb.uuid.parent={UUID}\nddb.uuid.parent={}", UUID.replace('5', "6"));
        assert!(parse(&twice).unwrap_err().to_string().contains("second time"));
    }
}
