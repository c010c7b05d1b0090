//! Units of quantities (`AllocationUnits`), DSP0004 annex C, and the older words of VMware.

/// Returns the number of bytes in a unit: `byte * 2^20`, `byte*10^6`, `MegaBytes`, `MB`; `None` if it is
/// unknown.
pub(super) fn bytes_in(unit: &str) -> Option<u64> {
    let unit: String = unit.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let unit = unit.to_ascii_lowercase();
    if let Some(words) = unit.strip_prefix("byte") {
        return match words.trim_start_matches('s') {
            "" => Some(1),
            power => {
                let (base, exponent) = power.strip_prefix('*')?.split_once('^')?;
                let base: u64 = base.parse().ok().filter(|base| matches!(base, 2 | 10))?;
                base.checked_pow(exponent.parse().ok()?)
            }
        };
    }
    let power = match unit.as_str() {
        "kb" | "kib" | "kilobyte" | "kilobytes" => 10,
        "mb" | "mib" | "megabyte" | "megabytes" => 20,
        "gb" | "gib" | "gigabyte" | "gigabytes" => 30,
        "tb" | "tib" | "terabyte" | "terabytes" => 40,
        _ => return None,
    };
    Some(1 << power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_have_powers_and_words() {
        for (unit, bytes) in [
            ("byte", Some(1)),
            ("byte * 2^20", Some(1 << 20)),
            ("byte*2^30", Some(1 << 30)),
            ("Byte * 10^6", Some(1_000_000)),
            ("MegaBytes", Some(1 << 20)),
            ("GB", Some(1 << 30)),
            ("byte * 2^64", None),
            ("byte * 3^2", None),
            ("byte * 2^-1", None),
            ("hertz * 10^6", None),
            ("", None),
        ] {
            assert_eq!(bytes_in(unit), bytes, "{unit}");
        }
    }
}
