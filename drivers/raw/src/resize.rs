//! Change of the length of a raw file.

use imgtool_core::{Error, OpenOptions, Output, Remedy, Resize, Result, zero};

/// Length in bytes of a read that looks for data in the part that is cut off. Our choice.
const READ_LEN: u64 = 1 << 20;

/// Sets the length of the file in `output`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if data would be cut off without permission;
/// [`imgtool_core::ErrorKind::Unsupported`] for a block device.
pub(crate) fn resize(output: &Output, resize: Resize, options: &OpenOptions) -> Result<()> {
    if output.capacity().is_some() {
        return Err(Error::unsupported("a block device has the size that its driver gives it")
            .path(output.location())
            .hint("enlarge it with the tools of its kind (lvextend, rbd resize)"));
    }
    if !resize.discards {
        check_zeros(output, resize.size, options)?;
    }
    output.set_len(resize.size)
}

fn check_zeros(output: &Output, size: u64, options: &OpenOptions) -> Result<()> {
    let input = output.reopen(&options.memory)?.into_random()?;
    let mut position = size;
    while position < input.len() {
        let run = input.run(position)?;
        while run.is_data && position < run.end {
            // At most 1 MiB.
            let len = READ_LEN.min(run.end - position);
            if !zero::is_zero(&input.read_vec(position, len as usize)?) {
                return Err(Error::refused("the part that would be cut off contains data")
                    .path(output.location())
                    .guest(position..position + len)
                    .remedied_by(Remedy::DiscardData));
            }
            position += len;
        }
        position = run.end;
    }
    Ok(())
}
