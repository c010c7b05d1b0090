//! Hints of the form "did you mean …?", which suggest the known name nearest to an unknown one.

/// Maximum number of names in a hint; the others are only counted. Our limit: keeps an error to a few lines.
const MAX_LISTED: usize = 24;

/// Maximum length in bytes of a name to compare. Our limit: the time grows with the product of both lengths,
/// and a name from an image may be 64 KiB long.
const MAX_COMPARED: usize = 128;

/// Returns the name in `known` that is nearest to `wanted`, if one is near: it differs in a few characters,
/// or one of the two names contains the other. Ignores case.
pub fn nearest<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = wanted.to_lowercase();
    if wanted.is_empty() || wanted.len() > MAX_COMPARED {
        return None;
    }
    // A third of the characters may be wrong, but only one of four: 'vmdk' is not a typing error for 'vhdx'.
    let allowed = (wanted.chars().count() + 1).div_euclid(3).max(1);
    known
        .into_iter()
        .filter(|name| !name.is_empty() && name.len() <= MAX_COMPARED)
        .filter_map(|name| {
            let lower = name.to_lowercase();
            let contained = wanted.len() > 2 && (lower.contains(&wanted) || wanted.contains(&lower));
            let distance = strsim::osa_distance(&wanted, &lower);
            (contained || distance <= allowed).then_some((distance, name))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Returns a hint about an unknown name: the nearest known name, then a list of the known names. `what` is
/// the plural noun for the names ("formats").
///
/// ```
/// let hint = imgtool_core::suggest::hint("qcow", "formats", ["raw", "qcow2"]);
/// assert_eq!(hint, "did you mean 'qcow2'? formats: raw, qcow2");
/// ```
pub fn hint<'a>(wanted: &str, what: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    let question = match nearest(wanted, known.iter().copied()) {
        Some(name) => format!("did you mean '{name}'? "),
        None => String::new(),
    };
    if known.is_empty() {
        return format!("there are no {what}");
    }
    let mut list = known.iter().take(MAX_LISTED).copied().collect::<Vec<_>>().join(", ");
    if known.len() > MAX_LISTED {
        list.push_str(&format!(" and {} more", known.len() - MAX_LISTED));
    }
    format!("{question}{what}: {list}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_only_similar_names() {
        let formats = ["raw", "qcow2", "vhdx", "vma"];
        for (wanted, meant) in [
            ("qcow", Some("qcow2")),
            ("qcwo2", Some("qcow2")),
            ("QCOW2", Some("qcow2")),
            ("vhd", Some("vhdx")),
            ("parallels", None),
            ("vmdk", None),
            ("", None),
        ] {
            assert_eq!(nearest(wanted, formats), meant, "{wanted}");
        }
        assert_eq!(nearest("scsi0", ["drive-scsi0", "drive-scsi1"]), Some("drive-scsi0"));
        assert_eq!(nearest(&"a".repeat(1 << 20), formats), None);
    }

    #[test]
    fn truncates_long_lists() {
        let names: Vec<String> = (0..100).map(|number| format!("drive-scsi{number}")).collect();
        let hint = hint("x", "devices", names.iter().map(String::as_str));
        assert!(hint.ends_with("drive-scsi23 and 76 more"), "{hint}");
    }
}
