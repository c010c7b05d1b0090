//! "Did you mean": the nearest of the names that would have been right.

/// Names beyond this many are counted, not listed: an error is a few lines. Ours.
const MAX_LISTED: usize = 16;

/// Longer names (an image's may have 64 KiB) are not compared: the work grows with both lengths.
const MAX_COMPARED: usize = 128;

/// The one of `known` that was probably meant by `wanted`, if one is near: a slip of a few letters,
/// or a name that contains the other.
pub fn nearest<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = wanted.to_lowercase();
    if wanted.is_empty() || wanted.len() > MAX_COMPARED {
        return None;
    }
    // A third of the letters may be wrong; of four only one, or 'vmdk' would be meant to be 'vhdx'.
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

/// What to say about a name that is not known: the nearest, then all (`what` in the plural).
///
/// ```
/// let hint = imgtool_toolkit::suggest::hint("qcow", "formats", ["raw", "qcow2"]);
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
    fn slips_are_understood_and_strangers_are_not() {
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
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..100).map(|number| format!("drive-scsi{number}")).collect();
        let hint = hint("x", "devices", names.iter().map(String::as_str));
        assert!(hint.ends_with("drive-scsi15 and 84 more"), "{hint}");
    }
}
