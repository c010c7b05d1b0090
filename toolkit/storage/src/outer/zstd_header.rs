//! Header of a zstd frame: the memory that its decoder will need, known before the decoder allocates it.

/// Magic_Number of a frame, RFC 8878, 3.1.1.
pub(super) const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Minimum of Window_Size in bytes, RFC 8878, 3.1.1.1.2.
const MIN_WINDOW_LOG: u32 = 10;

/// Memory of a decoder in bytes besides the window: its tables and two blocks of at most 128 KiB.
const DECODER: u64 = 512 << 10;

/// Memory that the decoder of a frame needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FrameMemory {
    /// The header continues after the given bytes.
    Incomplete,
    /// The decoder needs this many bytes; 0 if a skippable frame begins here, or no frame at all.
    Bytes(u64),
}

/// Returns the memory for the frame that begins with `head`.
pub(super) fn frame_memory(head: &[u8]) -> FrameMemory {
    let magic = head.len().min(MAGIC.len());
    if head[..magic] != MAGIC[..magic] {
        return FrameMemory::Bytes(0);
    }
    let Some(&descriptor) = head.get(4) else { return FrameMemory::Incomplete };
    // RFC 8878, 3.1.1.1.1: Frame_Content_Size_Flag, Single_Segment_Flag, Dictionary_ID_Flag.
    let single_segment = descriptor & 0x20 != 0;
    let dictionary_len = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size_len = match descriptor >> 6 {
        0 => usize::from(single_segment),
        1 => 2,
        2 => 4,
        _ => 8,
    };
    let size_at = 5 + usize::from(!single_segment) + dictionary_len;
    let Some(size_bytes) = head.get(size_at..size_at + size_len) else { return FrameMemory::Incomplete };
    let mut raw = [0; 8];
    raw[..size_len].copy_from_slice(size_bytes);
    // A field of two bytes counts from 256 on.
    let size = u64::from_le_bytes(raw).saturating_add(if size_len == 2 { 256 } else { 0 });
    let size = (size_len > 0).then_some(size);
    let window = match (single_segment, size) {
        (true, size) => size.unwrap_or(0),
        // The decoder's window is never longer than the content.
        (false, size) => window_size(head[5]).min(size.unwrap_or(u64::MAX)),
    };
    FrameMemory::Bytes(window.saturating_add(DECODER))
}

/// Returns the window in bytes of a Window_Descriptor, RFC 8878, 3.1.1.1.2.
fn window_size(descriptor: u8) -> u64 {
    let base = 1u64 << (MIN_WINDOW_LOG + u32::from(descriptor >> 3));
    base + base / 8 * u64::from(descriptor & 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(rest: &[u8]) -> Vec<u8> {
        [&MAGIC, rest].concat()
    }

    #[test]
    fn reads_the_window_of_every_kind_of_header() {
        let needs = |rest: &[u8]| match frame_memory(&frame(rest)) {
            FrameMemory::Bytes(bytes) => Some(bytes - DECODER),
            FrameMemory::Incomplete => None,
        };
        assert_eq!(needs(&[0x00, 0x88]), Some(128 << 20));
        assert_eq!(needs(&[0x04, 0x88]), Some(128 << 20), "with a checksum");
        assert_eq!(needs(&[0x00, 0x01]), Some(1152));
        assert_eq!(needs(&[0x03, 0x88, 1, 2, 3, 4]), Some(128 << 20), "with a dictionary");
        assert_eq!(needs(&[0x80, 0x88, 0, 0, 1, 0]), Some(65_536), "content shorter than the window");
        assert_eq!(needs(&[0x40, 0x88, 1, 0]), Some(257));
        assert_eq!(needs(&[0x20, 200]), Some(200), "a single segment");
        assert_eq!(needs(&[0xe0, 0, 0, 0, 8, 0, 0, 0, 0]), Some(128 << 20));
        for short in [&[][..], &[0x00], &[0x03, 0x88, 1, 2, 3], &[0xe0, 0, 0, 0, 8, 0, 0, 0]] {
            assert_eq!(needs(short), None, "{short:?}");
        }
    }

    #[test]
    fn needs_nothing_without_a_frame() {
        assert_eq!(frame_memory(&[]), FrameMemory::Incomplete);
        assert_eq!(frame_memory(&[0x28, 0xb5]), FrameMemory::Incomplete);
        assert_eq!(frame_memory(&[0x50, 0x2a, 0x4d, 0x18]), FrameMemory::Bytes(0));
        assert_eq!(frame_memory(b"text"), FrameMemory::Bytes(0));
    }
}
