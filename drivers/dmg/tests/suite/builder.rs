//! Builds images chunk by chunk.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use libdeflater::{CompressionLvl, Compressor};

/// Numbers of the types of chunks.
pub const ZERO: u32 = 0;
pub const RAW: u32 = 1;
pub const IGNORED: u32 = 2;
pub const ADC: u32 = 0x8000_0004;
pub const ZLIB: u32 = 0x8000_0005;
pub const BZIP2: u32 = 0x8000_0006;
pub const LZFSE: u32 = 0x8000_0007;
pub const LZMA: u32 = 0x8000_0008;

/// An image in the making: the tables with their chunks, and the stored bytes.
#[derive(Default)]
pub struct Builder {
    pub stored: Vec<u8>,
    pub tables: Vec<Vec<u8>>,
    pub sectors: u64,
    /// Bytes before the chunks.
    pub before: Vec<u8>,
    /// True to store the tables in a resource fork.
    pub fork: bool,
    /// Sectors that the trailer states besides those of the tables.
    pub more_sectors: u64,
}

fn compress(kind: u32, content: &[u8]) -> Vec<u8> {
    match kind {
        RAW => content.to_vec(),
        // Literals alone.
        ADC => content.chunks(128).flat_map(|part| [&[0x7f + part.len() as u8], part].concat()).collect(),
        ZLIB => {
            let mut compressor = Compressor::new(CompressionLvl::new(6).unwrap());
            let mut stored = vec![0; compressor.zlib_compress_bound(content.len())];
            let len = compressor.zlib_compress(content, &mut stored).unwrap();
            stored.truncate(len);
            stored
        }
        BZIP2 => {
            encode(content, |out| Box::new(bzip2::write::BzEncoder::new(out, bzip2::Compression::best())))
        }
        LZMA => encode(content, |out| Box::new(liblzma::write::XzEncoder::new(out, 6))),
        LZFSE => b"bvx-".to_vec(),
        _ => Vec::new(),
    }
}

fn encode(
    content: &[u8],
    encoder: impl for<'a> Fn(&'a mut Vec<u8>) -> Box<dyn std::io::Write + 'a>,
) -> Vec<u8> {
    let mut stored = Vec::new();
    encoder(&mut stored).write_all(content).unwrap();
    stored
}

impl Builder {
    /// Adds a table of chunks behind the last one. Each is a type and content.
    pub fn table(&mut self, chunks: &[(u32, &[u8])]) -> &mut Self {
        let (mut entries, mut sector, mut crc) = (Vec::new(), 0, crc32fast::Hasher::new());
        for (kind, content) in chunks {
            let (stored, sectors) = (compress(*kind, content), content.len() as u64 / 512);
            entries.extend([kind.to_be_bytes(), [0; 4]].concat());
            for number in [sector, sectors, self.stored.len() as u64, stored.len() as u64] {
                entries.extend(number.to_be_bytes());
            }
            self.stored.extend(stored);
            sector += sectors;
            if *kind != IGNORED {
                crc.update(content);
            }
        }
        entries.extend([&[0xff; 4], &[0; 4], &sector.to_be_bytes()[..], &[0; 24]].concat());
        let mut table = vec![0; 204];
        table[..8].copy_from_slice(b"mish\0\0\0\x01");
        table[8..16].copy_from_slice(&self.sectors.to_be_bytes());
        table[16..24].copy_from_slice(&sector.to_be_bytes());
        table[64..72].copy_from_slice(&[0, 0, 0, 2, 0, 0, 0, 32]);
        table[72..76].copy_from_slice(&crc.finalize().to_be_bytes());
        table[200..204].copy_from_slice(&(chunks.len() as u32 + 1).to_be_bytes());
        table.extend(entries);
        self.tables.push(table);
        self.sectors += sector;
        self
    }

    /// Changes the table `index`.
    pub fn with_table(&mut self, index: usize, change: impl FnOnce(&mut Vec<u8>)) -> &mut Self {
        change(&mut self.tables[index]);
        self
    }

    /// Returns the file.
    pub fn build(&self) -> Vec<u8> {
        let mut file = [&self.before[..], &self.stored].concat();
        let tables = if self.fork { self.resource_fork() } else { self.property_list().into_bytes() };
        let place = [file.len() as u64, tables.len() as u64];
        let (fork, list) = if self.fork { (place, [0; 2]) } else { ([0; 2], place) };
        file.extend(tables);
        let mut trailer = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| trailer[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01");
        put(24, &(self.before.len() as u64).to_be_bytes());
        put(32, &(self.stored.len() as u64).to_be_bytes());
        put(40, &[fork[0].to_be_bytes(), fork[1].to_be_bytes()].concat());
        put(56, &[0, 0, 0, 1, 0, 0, 0, 1]);
        put(80, &[0, 0, 0, 2, 0, 0, 0, 32]);
        put(88, &crc32fast::hash(&self.stored).to_be_bytes());
        put(216, &[list[0].to_be_bytes(), list[1].to_be_bytes()].concat());
        let checksums: Vec<u8> = self.tables.iter().flat_map(|table| table[72..76].to_vec()).collect();
        put(352, &[0, 0, 0, 2, 0, 0, 0, 32]);
        put(360, &crc32fast::hash(&checksums).to_be_bytes());
        put(488, &[0, 0, 0, 1]);
        put(492, &(self.sectors + self.more_sectors).to_be_bytes());
        file.extend(trailer);
        file
    }

    fn property_list(&self) -> String {
        let entry = |(number, table): (usize, &Vec<u8>)| {
            let text = STANDARD.encode(table);
            let lines: Vec<&str> =
                (0..text.len()).step_by(52).map(|at| &text[at..text.len().min(at + 52)]).collect();
            format!(
                "<dict>\n<key>Attributes</key><string>0x0050</string><key>CFName</key><string>a &amp; b</string>\
                 <key>Data</key>\n<data>\n\t{}\n</data>\n<key>ID</key><string>{number}</string>\
                 <key>Name</key><string>a &amp; b (Apple_HFS : {number})</string></dict>\n",
                lines.join("\n\t")
            )
        };
        let entries: String = self.tables.iter().enumerate().map(entry).collect();
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE plist PUBLIC \"-//Apple//DTD PLIST 1.0//EN\" \
             \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n<plist version=\"1.0\"><dict>\n\
             <key>resource-fork</key><dict><key>blkx</key><array>\n{entries}</array>\n\
             <key>plst</key><array><dict><key>Data</key><data>AAAA</data></dict></array></dict></dict></plist>\n"
        )
    }

    fn resource_fork(&self) -> Vec<u8> {
        let mut data: Vec<u8> = [&3_u32.to_be_bytes()[..], b"???"].concat();
        for table in &self.tables {
            data.extend((table.len() as u32).to_be_bytes());
            data.extend(table);
        }
        let len = data.len() as u32;
        let header = [256, 256 + len, len, 50].map(u32::to_be_bytes).concat();
        [&header[..], &[0; 240], &data, &[0; 50]].concat()
    }
}
