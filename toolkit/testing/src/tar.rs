//! Builder of tar archives and OVF packages, byte by byte.

use std::fmt::Write as _;

/// Length in bytes of a block.
const BLOCK: usize = 512;

/// A tar archive that is being built.
#[derive(Debug, Clone, Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

/// Returns the header of a member of ustar: name, type flag and length of its content.
pub fn header(name: &str, flag: u8, len: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[..name.len().min(100)].copy_from_slice(&name.as_bytes()[..name.len().min(100)]);
    for (at, text) in [(100, "0000644\0"), (108, "0000000\0"), (116, "0000000\0"), (136, "00000000000\0")] {
        block[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    set_size(&mut block, len);
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    sum(&mut block);
    block
}

/// Sets the length in a header: in octal, or, from 8 GiB on, to the base 256.
pub fn set_size(block: &mut [u8; BLOCK], len: u64) {
    match len >> 33 {
        0 => block[124..136].copy_from_slice(format!("{len:011o}\0").as_bytes()),
        _ => {
            block[124..128].copy_from_slice(b"\x80\0\0\0");
            block[128..136].copy_from_slice(&len.to_be_bytes());
        }
    }
}

/// Makes the checksum of a header right.
pub fn sum(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Returns a record of a pax header.
pub fn pax_record(key: &str, value: &str) -> String {
    let rest = key.len() + value.len() + 3;
    let len = (rest..).find(|len| len.to_string().len() + rest == *len).unwrap();
    format!("{len} {key}={value}\n")
}

impl Tar {
    /// Creates an archive without members.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a regular file.
    #[must_use]
    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.member(name, b'0', content)
    }

    /// Appends a member of any type.
    #[must_use]
    pub fn member(self, name: &str, flag: u8, content: &[u8]) -> Self {
        self.raw(&header(name, flag, content.len() as u64), content)
    }

    /// Appends a header as it is, and content with the bytes that fill its last block.
    #[must_use]
    pub fn raw(mut self, header: &[u8; BLOCK], content: &[u8]) -> Self {
        self.bytes.extend(header);
        self.bytes.extend(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self
    }

    /// Appends a file whose data are the runs of `disk` at these offsets and lengths, in the old form of GNU tar.
    #[must_use]
    pub fn sparse(self, name: &str, disk: &[u8], runs: &[(usize, usize)]) -> Self {
        let data: Vec<u8> = runs.iter().flat_map(|(at, len)| disk[*at..at + len].to_vec()).collect();
        let mut block = header(name, b'S', data.len() as u64);
        block[257..265].copy_from_slice(b"ustar  \0");
        block[345..500].fill(0);
        let pair = |(at, len): &(usize, usize)| format!("{at:011o}\0{len:011o}\0").into_bytes();
        let mut pairs: Vec<Vec<u8>> = runs.iter().map(pair).collect();
        pairs.push(pair(&(disk.len(), 0)));
        let (first, rest) = pairs.split_at(pairs.len().min(4));
        block[386..386 + first.len() * 24].copy_from_slice(&first.concat());
        block[482] = u8::from(!rest.is_empty());
        block[483..495].copy_from_slice(format!("{:011o}\0", disk.len()).as_bytes());
        sum(&mut block);
        let chunks: Vec<&[Vec<u8>]> = rest.chunks(21).collect();
        let mut map = Vec::new();
        for (number, chunk) in chunks.iter().enumerate() {
            let mut block = chunk.concat();
            block.resize(BLOCK, 0);
            block[504] = u8::from(number + 1 < chunks.len());
            map.extend(block);
        }
        self.raw(&block, &[map, data].concat())
    }

    /// Returns the archive with its end mark.
    pub fn build(self) -> Vec<u8> {
        let mut bytes = self.without_end();
        bytes.resize(bytes.len() + 2 * BLOCK, 0);
        bytes
    }

    /// Returns the archive without its end mark.
    pub fn without_end(self) -> Vec<u8> {
        self.bytes
    }
}

/// Disk of a descriptor: the name of its file and its capacity in bytes.
pub type DescribedDisk<'a> = (&'a str, u64);

/// Returns an OVF document of a machine with these disks, on one SCSI controller.
pub fn descriptor(name: &str, disks: &[DescribedDisk<'_>]) -> String {
    let (mut files, mut entries, mut items) = (String::new(), String::new(), String::new());
    for (index, (file, capacity)) in disks.iter().enumerate() {
        write!(files, r#"<File ovf:href="{file}" ovf:id="file{index}"/>"#).unwrap();
        let format = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";
        write!(
            entries,
            r#"<Disk ovf:capacity="{capacity}" ovf:diskId="vmdisk{index}" ovf:fileRef="file{index}" ovf:format="{format}"/>"#
        )
        .unwrap();
        write!(
            items,
            "<Item><rasd:AddressOnParent>{index}</rasd:AddressOnParent><rasd:ElementName>disk{index}</rasd:ElementName>\
             <rasd:HostResource>ovf:/disk/vmdisk{index}</rasd:HostResource><rasd:InstanceID>{}</rasd:InstanceID>\
             <rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>",
            10 + index
        )
        .unwrap();
    }
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
<References>{files}</References><DiskSection><Info/>{entries}</DiskSection>
<VirtualSystem ovf:id="{name}"><Info/><Name>{name}</Name><VirtualHardwareSection><Info/>
<Item><rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits><rasd:ElementName>cpu</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ElementName>memory</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item>
<Item><rasd:Address>0</rasd:Address><rasd:ElementName>scsi</rasd:ElementName><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceSubType>lsilogic</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType></Item>
{items}</VirtualHardwareSection></VirtualSystem></Envelope>
"#
    )
}

/// Returns the manifest of these files, with SHA-256.
pub fn manifest(files: &[(&str, &[u8])]) -> String {
    let line = |(name, content): &(&str, &[u8])| format!("SHA256({name})= {}\n", crate::sha256(content));
    files.iter().map(line).collect()
}
