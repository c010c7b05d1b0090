//! A small tree of an XML document, within limits.
//!
//! The parser expands nothing: a document type is refused, and of the references only the five predefined
//! ones and those of characters are known. So the tree is never larger than the document, apart from a
//! constant for each element and attribute.

use imgtool_core::{Error, Result};
use quick_xml::NsReader;
use quick_xml::XmlVersion;
use quick_xml::events::{BytesDecl, BytesStart, Event};
use quick_xml::name::{Namespace, NamespaceError, ResolveResult};

/// Maximum length in bytes of a document. Our limit: real descriptions of a machine have less than 30 KiB.
pub const MAX_LEN: usize = 4 << 20;
/// Maximum depth of the elements. Our limit: OVF and libvirt have 8.
const MAX_DEPTH: usize = 64;
/// Maximum number of elements. Our limit: a machine with 254 disks has less than 5000.
const MAX_ELEMENTS: usize = 50_000;
/// Maximum number of attributes of an element. Our limit: real ones have 10.
const MAX_ATTRIBUTES: usize = 1000;
/// Maximum number of attributes of a document. Our limit: three for each element.
const MAX_ALL_ATTRIBUTES: usize = 3 * MAX_ELEMENTS;
/// Maximum length in bytes of an attribute's value and of an element's text.
const MAX_VALUE: usize = 64 << 10;

macro_rules! namespaces {
    ($($(#[$doc:meta])* $name:ident = [$($uri:literal),*],)*) => {
        /// Namespace of a name, as far as the dialects need it. A prefix means nothing, the URI alone counts.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Space {
            /// None.
            None,
            /// Any other than those below.
            Other,
            $($(#[$doc])* $name,)*
        }

        impl Space {
            fn of(uri: &str) -> Self {
                match uri {
                    $($($uri)|* => Self::$name,)*
                    _ => Self::Other,
                }
            }
        }
    };
}

namespaces! {
    /// The envelope of OVF 1.x, 2.0 and VMware's 0.9.
    Ovf = [
        "http://schemas.dmtf.org/ovf/envelope/1",
        "http://schemas.dmtf.org/ovf/envelope/2",
        "http://www.vmware.com/schema/ovf/1/envelope"
    ],
    /// Settings of a resource (CIM), of a disk and of an Ethernet port (OVF 2.0).
    Rasd = [
        "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData",
        "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_StorageAllocationSettingData.xsd",
        "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_StorageAllocationSettingData",
        "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_EthernetPortAllocationSettingData.xsd",
        "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_EthernetPortAllocationSettingData"
    ],
    /// Settings of a virtual system (CIM).
    Vssd = ["http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"],
    /// VMware's extensions of OVF.
    Vmw = ["http://www.vmware.com/schema/ovf"],
    /// VirtualBox's extension of OVF.
    Vbox = ["http://www.virtualbox.org/ovf/machine"],
}

/// An element with all of its content.
#[derive(Debug)]
pub struct Element {
    /// Namespace of the name.
    pub space: Space,
    /// Name without prefix.
    pub name: String,
    attributes: Vec<(Space, String, String)>,
    /// Elements inside, in order.
    pub children: Vec<Element>,
    text: String,
}

impl Element {
    /// Returns the text directly inside, without blanks around it.
    pub fn text(&self) -> &str {
        self.text.trim()
    }

    /// Returns an attribute in a namespace or without one: producers of OVF forget the prefix.
    pub fn attribute_in(&self, space: Space, name: &str) -> Option<&str> {
        let with = |wanted: Space| {
            let mut all = self.attributes.iter();
            all.find(|(space, known, _)| *space == wanted && known == name).map(|(_, _, value)| &**value)
        };
        with(space).or_else(|| with(Space::None))
    }

    /// Returns an attribute without a namespace.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attribute_in(Space::None, name)
    }

    /// Returns the elements of this name directly inside, in any namespace.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> + 'a {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// Returns the first element of this name directly inside.
    pub fn child<'a>(&'a self, name: &'a str) -> Option<&'a Element> {
        self.all(name).next()
    }

    /// Returns the text of the first element of this name, if it is not empty.
    pub fn child_text<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.child(name).map(Element::text).filter(|text| !text.is_empty())
    }
}

/// Parses a document and returns its outermost element. `what` names the document in errors ("the
/// descriptor").
///
/// # Errors
/// [`imgtool_core::ErrorKind::Malformed`] if this is no well-formed XML, `Unsupported` for a document type
/// and another encoding than UTF-8, `LimitExceeded` beyond the limits.
pub fn parse(bytes: &[u8], what: &str) -> Result<Element> {
    if bytes.len() > MAX_LEN {
        let len = bytes.len();
        return Err(Error::limit(format!("{what} has {len} bytes, more than {MAX_LEN}")));
    }
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(other_encoding(what, "UTF-16"));
    }
    let text = std::str::from_utf8(bytes)
        .map_err(|e| Error::malformed(format!("{what} is not UTF-8")).at(e.valid_up_to() as u64))?;
    Tree { what, elements: 0, attributes: 0, open: Vec::new(), root: None }.parse(text)
}

fn other_encoding(what: &str, encoding: &str) -> Error {
    Error::unsupported(format!("{what} is in {encoding}, only UTF-8 is supported"))
        .hint("convert it, for example with iconv, and change its encoding declaration")
}

/// The tree while it is built.
struct Tree<'a> {
    what: &'a str,
    elements: usize,
    attributes: usize,
    /// Elements that have begun but not ended, outermost first.
    open: Vec<Element>,
    root: Option<Element>,
}

impl Tree<'_> {
    fn parse(mut self, text: &str) -> Result<Element> {
        let mut reader = NsReader::from_str(text.trim_start_matches('\u{feff}'));
        loop {
            let event = reader.read_event();
            let position = reader.buffer_position();
            match self.take(&reader, event.map_err(|e| self.unread(&e).at(position))?) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => return Err(error.at(position)),
            }
        }
        if let Some(open) = self.open.last() {
            return Err(self.damaged(&format_args!("it ends within <{}>", shortened(&open.name))));
        }
        self.root.ok_or_else(|| Error::malformed(format!("{} holds no XML element", self.what)))
    }

    /// Adds an event to the tree. Returns false at the end.
    fn take(&mut self, reader: &NsReader<&[u8]>, event: Event<'_>) -> Result<bool> {
        match event {
            Event::Start(start) => {
                let element = self.element(reader, &start)?;
                self.open.push(element);
            }
            Event::Empty(start) => {
                let element = self.element(reader, &start)?;
                self.close(element)?;
            }
            Event::End(_) => {
                let element = self.open.pop().ok_or_else(|| self.damaged(&"an element ends twice"))?;
                self.close(element)?;
            }
            Event::Text(text) => self.add_text(&text.xml10_content())?,
            Event::CData(text) => self.add_text(&text.xml10_content())?,
            Event::GeneralRef(reference) => {
                let known = match &*reference {
                    "lt" => Some('<'),
                    "gt" => Some('>'),
                    "amp" => Some('&'),
                    "apos" => Some('\''),
                    "quot" => Some('"'),
                    _ => reference.resolve_char_ref().map_err(|e| self.damaged(&e))?,
                };
                let unknown = || self.damaged(&format_args!("'&{};' is not defined", shortened(&reference)));
                let known = known.ok_or_else(unknown)?;
                self.add_text(known.encode_utf8(&mut [0; 4]))?;
            }
            Event::DocType(_) => {
                return Err(Error::unsupported(format!(
                    "{} has a document type, which is refused",
                    self.what
                ))
                .hint("remove the <!DOCTYPE> declaration"));
            }
            Event::Decl(declaration) => self.check_encoding(&declaration)?,
            Event::Comment(_) | Event::PI(_) => {}
            Event::Eof => return Ok(false),
        }
        Ok(true)
    }

    fn check_encoding(&self, declaration: &BytesDecl<'_>) -> Result<()> {
        let Some(encoding) = declaration.encoding() else { return Ok(()) };
        let encoding = encoding.map_err(|e| self.damaged(&e))?;
        if ["utf-8", "utf8", "us-ascii", "ascii"].contains(&&*encoding.to_ascii_lowercase()) {
            return Ok(());
        }
        Err(other_encoding(self.what, shortened(&encoding)))
    }

    /// Creates an element without content from its tag.
    fn element(&mut self, reader: &NsReader<&[u8]>, start: &BytesStart<'_>) -> Result<Element> {
        self.elements += 1;
        if self.elements > MAX_ELEMENTS {
            return Err(self.too_many("elements", MAX_ELEMENTS));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(self.too_many("levels of elements", MAX_DEPTH));
        }
        let (space, name) = reader.resolver().resolve_element(start.name());
        let mut element = Element {
            space: space_of(&space),
            name: name.as_ref().to_owned(),
            attributes: Vec::new(),
            children: Vec::new(),
            text: String::new(),
        };
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|e| self.damaged(&e))?;
            self.attributes += 1;
            if element.attributes.len() >= MAX_ATTRIBUTES {
                return Err(self.too_many("attributes of an element", MAX_ATTRIBUTES));
            }
            if self.attributes > MAX_ALL_ATTRIBUTES {
                return Err(self.too_many("attributes", MAX_ALL_ATTRIBUTES));
            }
            if attribute.key.as_namespace_binding().is_some() {
                continue;
            }
            let (space, name) = reader.resolver().resolve_attribute(attribute.key);
            let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|e| self.damaged(&e))?;
            if value.len() > MAX_VALUE {
                return Err(self.too_many("bytes in an attribute", MAX_VALUE));
            }
            element.attributes.push((space_of(&space), name.as_ref().to_owned(), value.into_owned()));
        }
        Ok(element)
    }

    /// Adds a finished element to the one around it.
    fn close(&mut self, element: Element) -> Result<()> {
        match self.open.last_mut() {
            Some(parent) => parent.children.push(element),
            None if self.root.is_some() => return Err(self.damaged(&"it has two outermost elements")),
            None => self.root = Some(element),
        }
        Ok(())
    }

    fn add_text(&mut self, text: &str) -> Result<()> {
        let Some(element) = self.open.last_mut() else {
            return match text.trim().is_empty() {
                true => Ok(()),
                false => Err(self.damaged(&"it has text outside of its elements")),
            };
        };
        // Blanks between the elements inside are no text.
        if element.text.is_empty() && text.trim().is_empty() {
            return Ok(());
        }
        if element.text.len().saturating_add(text.len()) > MAX_VALUE {
            return Err(self.too_many("bytes of text in an element", MAX_VALUE));
        }
        element.text.push_str(text);
        Ok(())
    }

    /// Returns the error for what the parser refuses.
    fn unread(&self, why: &quick_xml::Error) -> Error {
        match why {
            quick_xml::Error::Namespace(NamespaceError::TooManyBindings(most)) => {
                self.too_many("prefixes of namespaces", *most)
            }
            why => self.damaged(why),
        }
    }

    fn damaged(&self, why: &dyn std::fmt::Display) -> Error {
        Error::malformed(format!("{} is no well-formed XML: {why}", self.what))
    }

    fn too_many(&self, what: &str, most: usize) -> Error {
        Error::limit(format!("{} has more than {most} {what}", self.what))
    }
}

fn space_of(resolved: &ResolveResult<'_>) -> Space {
    match resolved {
        ResolveResult::Bound(Namespace(uri)) => Space::of(uri),
        ResolveResult::Unbound => Space::None,
        ResolveResult::Unknown(_) => Space::Other,
    }
}

/// Returns the start of a text from a document, for a message.
pub fn shortened(text: &str) -> &str {
    first(text, 64)
}

/// Returns a name from a document, at most 255 characters of it. Our limit: file systems have the same.
pub fn bounded(name: &str) -> &str {
    first(name, 255)
}

fn first(text: &str, count: usize) -> &str {
    match text.char_indices().nth(count) {
        Some((end, _)) => &text[..end],
        None => text,
    }
}

/// Returns a text for an attribute or an element. Characters that XML can't hold become U+FFFD.
pub fn escaped(text: &str) -> String {
    let is_legal = |c: char| matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{fffd}' | '\u{10000}'..);
    let legal: String = text.chars().map(|c| if is_legal(c) { c } else { '\u{fffd}' }).collect();
    quick_xml::escape::escape(legal).replace('\n', "&#10;").replace('\t', "&#9;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgtool_core::ErrorKind;

    fn tree(text: &str) -> Result<Element> {
        parse(text.as_bytes(), "the document")
    }

    #[test]
    fn reads_names_by_their_namespace_and_texts() {
        let root = tree(
            "\u{feff}<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!-- c -->\n<E xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
             xmlns:o='http://schemas.dmtf.org/ovf/envelope/1'>\n <F o:href=\"a&amp;b&#x41;\" id='x'/>\n <G> one &lt; \
             <![CDATA[two & ]]>three </G><p:H xmlns:p='urn:x'/></E>\n",
        )
        .expect("a document");
        assert_eq!((root.space, &*root.name), (Space::Ovf, "E"));
        let file = root.child("F").expect("an element");
        assert_eq!(file.attribute_in(Space::Ovf, "href"), Some("a&bA"));
        assert_eq!(file.attribute_in(Space::Ovf, "id"), Some("x"));
        assert_eq!(file.attribute("href"), None);
        assert_eq!(root.child_text("G"), Some("one < two & three"));
        assert_eq!(root.child("H").map(|child| child.space), Some(Space::Other));
        assert_eq!(root.text(), "");
    }

    #[test]
    fn refuses_what_is_no_document() {
        use ErrorKind::{LimitExceeded, Malformed, Unsupported};
        let deep = "<a>".repeat(70);
        let many = format!("<a>{}</a>", "<b/>".repeat(MAX_ELEMENTS));
        let wide: String = (0..=MAX_ATTRIBUTES).map(|n| format!(" a{n}=''")).collect();
        let long = "x".repeat(MAX_VALUE + 1);
        let prefixes: String = (0..200).map(|number| format!(" xmlns:p{number}='u'")).collect();
        for (text, kind) in [
            ("", Malformed),
            ("text", Malformed),
            ("<a>", Malformed),
            ("<a></b>", Malformed),
            ("<a/><b/>", Malformed),
            ("<a/>text", Malformed),
            ("<a>&unknown;</a>", Malformed),
            ("<a b='&unknown;'/>", Malformed),
            ("<a b='1' b='2'/>", Malformed),
            ("<a>&#0;</a>", Malformed),
            ("<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>", Unsupported),
            ("<?xml version='1.0' encoding='ISO-8859-1'?><a/>", Unsupported),
            (&deep, LimitExceeded),
            (&many, LimitExceeded),
            (&format!("<a{wide}/>"), LimitExceeded),
            (&format!("<a{prefixes}/>"), LimitExceeded),
            (&format!("<a>{long}</a>"), LimitExceeded),
            (&format!("<a b='{long}'/>"), LimitExceeded),
            (&format!("<a>{}</a>", " ".repeat(MAX_LEN)), LimitExceeded),
        ] {
            let error = tree(text).expect_err(&text[..text.len().min(80)]);
            assert_eq!(error.kind(), kind, "{error}");
        }
        assert_eq!(parse(&[0xff, 0xfe, b'<', 0], "it").map_err(|e| e.kind()).err(), Some(Unsupported));
        assert_eq!(parse(&[b'<', 0xff], "it").map_err(|e| e.kind()).err(), Some(Malformed));
    }

    #[test]
    fn escaped_text_survives_a_document() {
        for text in ["a<b>&\"'c", "two\nlines\tand\rmore", "\u{0}\u{b}", "ä\u{10ffff}\u{ffff}"] {
            let clean: String =
                text.chars().map(|c| if "\u{0}\u{b}\u{ffff}".contains(c) { '\u{fffd}' } else { c }).collect();
            let document = format!("<a b=\"{0}\">{0}</a>", escaped(text));
            let root = tree(&document).expect("a document");
            assert_eq!(root.attribute("b"), Some(&*clean), "{document}");
            assert_eq!(root.text(), clean, "{document}");
        }
    }
}
