//! Encryption of a new image: the LUKS header, and the data clusters after they are placed, since the number of
//! a sector is that of the file.

use imgtool_core::{Bytes, Error, Output, Prepared, Remedy, Result, WriteList};
use imgtool_crypt::{NewHeader, SECTOR};

use super::alloc::Allocator;
use crate::options::WriteOptions;

/// LUKS header of a new image, with its place.
pub(super) struct Encrypted {
    header: NewHeader,
    /// Host offset of the header.
    offset: u64,
    cluster_size: usize,
}

impl Encrypted {
    /// Creates the encryption that the options ask for, and allocates the clusters of its header.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] without a passphrase.
    pub(super) fn create(options: &WriteOptions, alloc: &mut Allocator) -> Result<Option<Self>> {
        let Some(volume) = &options.encryption else { return Ok(None) };
        let Some(secret) = &options.secret else {
            return Err(
                Error::usage("an encrypted image needs a passphrase").remedied_by(Remedy::GiveTargetSecret)
            );
        };
        let header = volume.create(secret)?;
        let cluster_size = options.shape.cluster_size();
        let offset = alloc.allocate(header.payload_offset.div_ceil(cluster_size))?;
        // At most 2 MiB.
        Ok(Some(Self { header, offset, cluster_size: cluster_size as usize }))
    }

    /// Returns the host offset and the length of the header.
    pub(super) fn place(&self) -> (u64, u64) {
        (self.offset, self.header.payload_offset)
    }

    /// Writes the header. The material of unused slots stays a hole.
    pub(super) fn write_header(&self, output: &Output) -> Result<()> {
        if output.needs_zeros() {
            output.write_zeros_at(self.offset, self.header.payload_offset)?;
        }
        output.write_at(&self.header.bytes, self.offset)
    }

    /// Encrypts the clusters of a placed piece. A disk may end within its last cluster, whose rest becomes zeros.
    pub(super) fn seal(
        &self,
        prepared: &mut Prepared,
        writes: &mut WriteList,
        output: &Output,
    ) -> Result<()> {
        let Some(data) = &mut prepared.data else { return Ok(()) };
        let mut last = None;
        for write in writes.writes_mut() {
            let Bytes::Data(range) = &mut write.bytes else {
                return Err(Error::malformed("an encrypted image stores whole clusters only"));
            };
            let sector = write.file_offset / SECTOR as u64;
            let whole = range.len() - range.len() % self.cluster_size;
            let (body, rest) = data[range.clone()].split_at_mut(whole);
            self.header.cipher.encrypt(body, sector);
            if !rest.is_empty() {
                let offset = write.file_offset.saturating_add(whole as u64);
                let room = output.capacity().map_or(u64::MAX, |capacity| capacity.saturating_sub(offset));
                let mut cluster = rest.to_vec();
                let len = (self.cluster_size as u64).min(room - room % SECTOR as u64);
                // At most a cluster, and at least the sectors of the rest.
                cluster.resize((len as usize).max(rest.len().next_multiple_of(SECTOR)), 0);
                self.header.cipher.encrypt(&mut cluster, offset / SECTOR as u64);
                last = Some((write.output, offset, Bytes::Owned(cluster)));
            }
            range.end = range.start + whole;
        }
        if let Some((output, offset, bytes)) = last {
            writes.push(output, offset, bytes);
        }
        Ok(())
    }
}
