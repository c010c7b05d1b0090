//! Look-up of devices by id.

use imgtool_core::DeviceId;

use crate::layout::TABLE_ENTRIES;

/// Map from the id of each device to its index in the list of devices.
#[derive(Debug, Clone)]
pub(crate) struct DeviceIds {
    /// Index of the device with each id; [`DeviceIds::NONE`] for an id without a device.
    indices: [u8; TABLE_ENTRIES],
    /// Number of devices.
    len: u8,
}

impl DeviceIds {
    /// Marker for an id without a device. It is never an index: an archive has at most 254 devices.
    const NONE: u8 = u8::MAX;

    /// Adds the id of the next device in the list. Ids are indices into a table of [`TABLE_ENTRIES`] entries.
    pub(crate) fn push(&mut self, id: DeviceId) {
        if let Some(index) = self.indices.get_mut(id.0 as usize) {
            *index = self.len;
            self.len = self.len.saturating_add(1);
        }
    }

    /// Returns the index of the device with this id, or `None` if there is no such device.
    pub(crate) fn index_of(&self, id: DeviceId) -> Option<usize> {
        let index = *self.indices.get(id.0 as usize)?;
        (index != Self::NONE).then_some(usize::from(index))
    }
}

impl Default for DeviceIds {
    fn default() -> Self {
        Self { indices: [Self::NONE; TABLE_ENTRIES], len: 0 }
    }
}
