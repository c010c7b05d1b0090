//! Apple Data Compression (ADC), the method of the oldest images: literals and copies, without entropy coding.

/// Decodes `stored` until `out` is full, or returns the reason for the failure.
///
/// A byte with bit 7 announces 1 to 128 literals. A byte with bit 6 and the next two are a copy of 4 to 67 bytes
/// from up to 64 KiB before; any other byte and the next one are a copy of 3 to 18 bytes from up to 1 KiB before.
pub(crate) fn decode(stored: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    const CUT: &str = "the data ends early";
    let (mut from, mut to) = (0, 0);
    let byte = |at: usize| stored.get(at).copied().map(usize::from).ok_or(CUT);
    while to < out.len() {
        let code = byte(from)?;
        if code & 0x80 != 0 {
            let len = (code & 0x7f) + 1;
            let literals = stored.get(from + 1..from + 1 + len).ok_or(CUT)?;
            out.get_mut(to..to + len).ok_or("it decodes to too many bytes")?.copy_from_slice(literals);
            (from, to) = (from + 1 + len, to + len);
            continue;
        }
        let (len, distance, used) = if code & 0x40 != 0 {
            ((code & 0x3f) + 4, (byte(from + 1)? << 8 | byte(from + 2)?) + 1, 3)
        } else {
            ((code >> 2) + 3, ((code & 3) << 8 | byte(from + 1)?) + 1, 2)
        };
        if distance > to {
            return Err("a copy begins before the data");
        }
        if len > out.len() - to {
            return Err("it decodes to too many bytes");
        }
        // A copy may overlap its own result.
        for at in to..to + len {
            out[at] = out[at - distance];
        }
        (from, to) = (from + used, to + len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_literals_and_both_kinds_of_copies() {
        let mut out = [0; 2 + 3 + 67];
        // Two literals, three bytes from 2 before, 67 bytes from 5 before.
        let stored = [0x81, b'a', b'b', 0x00, 1, 0x7f, 0, 4];
        assert_eq!(decode(&stored, &mut out), Ok(()));
        assert_eq!(&out[..12], b"ababaababaab");
    }

    #[test]
    fn refuses_damaged_data() {
        let decode = |stored: &[u8]| decode(stored, &mut [0; 8]);
        assert_eq!(decode(&[0x81, 1]), Err("the data ends early"));
        assert_eq!(decode(&[0x80, 1]), Err("the data ends early"));
        assert_eq!(decode(&[0x40, 0]), Err("the data ends early"));
        assert_eq!(decode(&[0x00, 0]), Err("a copy begins before the data"));
        assert_eq!(decode(&[0x80, 1, 0x44, 0, 0]), Err("it decodes to too many bytes"));
        assert_eq!(decode(&[0x88, 1, 2, 3, 4, 5, 6, 7, 8, 9]), Err("it decodes to too many bytes"));
    }
}
