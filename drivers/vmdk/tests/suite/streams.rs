//! Streams of compressed grains, in the layouts of several programs: read by position and from a pipe, cut,
//! damaged, and written.

use std::sync::Arc;

use imgtool_core::{Access, BufferPool, Driver, ErrorKind, ImageSource, OpenOptions, Result};
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_testing::{memory, oracles};
use imgtool_vmdk::VmdkDriver;
use libdeflater::Decompressor;

use crate::crafted::open_bytes;
use crate::support::{check, content, make, options, save, small};

const GRAIN: usize = 65_536;

/// Part of a stream.
#[derive(Clone)]
pub enum Part {
    Grain(u64, Vec<u8>),
    Table,
    EmptyTable,
    Directory,
    Footer,
    Progress,
    End,
    Bytes(Vec<u8>),
}

/// Place of the directory that the header states.
#[derive(Clone, Copy, PartialEq)]
pub enum Place {
    Front,
    End,
    /// Behind the grains, but in the header (vmdktool).
    Known,
}

/// Compresses a grain with stored blocks, as no compressor would.
fn zlib(bytes: &[u8]) -> Vec<u8> {
    let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), byte| {
        let a = (a + u32::from(*byte)) % 65_521;
        (a, (b + a) % 65_521)
    });
    let mut out = vec![0x78, 0x01];
    let chunks: Vec<&[u8]> = bytes.chunks(65_535).collect();
    for (index, chunk) in chunks.iter().enumerate() {
        let len = chunk.len() as u16;
        out.push(u8::from(index + 1 == chunks.len()));
        out.extend(len.to_le_bytes());
        out.extend((!len).to_le_bytes());
        out.extend_from_slice(chunk);
    }
    out.extend((b << 16 | a).to_be_bytes());
    out
}

fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..16].copy_from_slice(&kind.to_le_bytes());
    bytes
}

/// Builds a stream of a disk of `sectors` sectors with one table, whose sector 128 is the first marker.
pub fn stream(sectors: u64, place: Place, parts: &[Part]) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..4].copy_from_slice(b"KDMV");
    header[4] = 3;
    header[8..12].copy_from_slice(&0x3_0001_u32.to_le_bytes());
    header[12..20].copy_from_slice(&sectors.to_le_bytes());
    header[20] = 128;
    header[44..48].copy_from_slice(&512u32.to_le_bytes());
    header[56..64].fill(0xff);
    header[64] = 128;
    header[73..77].copy_from_slice(b"\n \r\n");
    header[77] = 1;
    let mut bytes = header.clone();
    bytes.resize(128 * 512, 0);
    // Long enough for the grains of several tables, of which the first is written.
    let mut table = vec![0; 8192];
    let (mut table_at, mut directory_at) = (40, 39);
    for part in parts {
        let sector = (bytes.len() / 512) as u32;
        match part {
            Part::Grain(grain, content) => {
                table[*grain as usize * 4..][..4].copy_from_slice(&sector.to_le_bytes());
                let data = zlib(content);
                bytes.extend((grain * 128).to_le_bytes());
                bytes.extend((data.len() as u32).to_le_bytes());
                bytes.extend(data);
            }
            Part::Table => {
                table_at = sector + 1;
                bytes.extend([&marker(4, 1)[..], &table[..2048]].concat());
            }
            Part::EmptyTable => {
                table_at = sector + 1;
                bytes.extend([marker(4, 1), vec![0; 2048]].concat());
            }
            Part::Directory => {
                directory_at = sector + 1;
                bytes.extend(marker(1, 2));
                bytes.extend(table_at.to_le_bytes());
            }
            Part::Footer => {
                let mut footer = header.clone();
                footer[56..64].copy_from_slice(&u64::from(directory_at).to_le_bytes());
                bytes.extend([marker(1, 3), footer].concat());
            }
            Part::Progress => bytes.extend(marker(0, 4)),
            Part::End => bytes.extend(marker(0, 0)),
            Part::Bytes(more) => bytes.extend(more),
        }
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    match place {
        Place::Front => {
            bytes[39 * 512..][..4].copy_from_slice(&40u32.to_le_bytes());
            bytes[40 * 512..][..2048].copy_from_slice(&table[..2048]);
            bytes[56..64].copy_from_slice(&39u64.to_le_bytes());
        }
        Place::Known => bytes[56..64].copy_from_slice(&u64::from(directory_at).to_le_bytes()),
        Place::End => {}
    }
    bytes
}

/// Reads a stream from a pipe.
pub fn from_pipe_with(bytes: &[u8], options: &OpenOptions) -> Result<Vec<u8>> {
    assert!(VmdkDriver.reads_stream(&bytes[..bytes.len().min(4096)]), "not a stream");
    all_pieces(&VmdkDriver.open(memory::as_stream("x.vmdk", bytes), options)?)
}

/// Reads an image in one pass.
fn all_pieces(source: &Arc<dyn ImageSource>) -> Result<Vec<u8>> {
    let Access::Stream(pass) = source.access() else { panic!("not read in one pass") };
    let mut content = Vec::new();
    let mut pass = pass.lock().unwrap();
    while let Some(piece) = pass.next_piece(&BufferPool::new())? {
        assert_eq!(piece.start, content.len() as u64);
        match piece.data {
            Some(data) => content.extend_from_slice(&data),
            None => content.resize(content.len() + piece.len as usize, 0),
        }
    }
    Ok(content)
}

fn from_pipe(bytes: &[u8]) -> Result<Vec<u8>> {
    from_pipe_with(bytes, &OpenOptions::default())
}

fn grains(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [*byte; GRAIN]).collect()
}

fn data(byte: u8) -> Vec<u8> {
    vec![byte; GRAIN]
}

/// Sectors of the disk in most tests: four grains and a part of a fifth.
const SECTORS: u64 = 4 * 128 + 100;

fn expected() -> Vec<u8> {
    [grains(&[0, 1, 0, 2]), vec![3; 51_200]].concat()
}

fn three(last: usize) -> [Part; 3] {
    [Part::Grain(1, data(1)), Part::Grain(3, data(2)), Part::Grain(4, vec![3; last])]
}

#[test]
fn reads_all_layouts_by_position_and_from_a_pipe() {
    use Part::{Bytes, Directory, End, Footer, Progress, Table};
    let tail = [Table, Directory, Footer, End];
    let layouts: [(Place, Vec<Part>); 8] = [
        (Place::Front, [&three(GRAIN)[..], &[End]].concat()),
        // qemu-img ends right behind the last grain, or with zeros, and its last grain may be short.
        (Place::Front, three(51_200).to_vec()),
        (Place::Front, [&three(51_200)[..], &[Bytes(vec![0; 65_536])]].concat()),
        (Place::End, [&three(GRAIN)[..], &tail].concat()),
        (Place::End, [&[Progress][..], &three(51_200), &[Progress], &tail].concat()),
        (Place::End, [&three(GRAIN)[..], &tail, &[Bytes(vec![0; 5120])]].concat()),
        (Place::End, [&three(GRAIN)[..], &[Table, Directory, Progress, Footer, Progress, End]].concat()),
        (Place::Known, [&three(GRAIN)[..], &tail].concat()),
    ];
    for (number, (place, parts)) in layouts.iter().enumerate() {
        let bytes = stream(SECTORS, *place, parts);
        assert!(open_bytes(&bytes).unwrap() == expected(), "layout {number} by position");
        assert!(from_pipe(&bytes).unwrap() == expected(), "layout {number} from a pipe");
    }
    let empty = [Part::EmptyTable, Directory, Footer, End];
    assert!(from_pipe(&stream(200, Place::End, &empty)).unwrap() == vec![0; 200 * 512]);
}

#[track_caller]
fn assert_fault(bytes: &[u8], kind: ErrorKind, text: &str) {
    let error = from_pipe(bytes).map(|_| ()).unwrap_err();
    assert!(error.kind() == kind && format!("{error:#}").contains(text), "{error:#}, not {text}");
}

#[test]
fn a_cut_stream_is_an_error_wherever_it_ends() {
    use Part::{Directory, End, Footer, Table};
    for (place, tail) in [(Place::Front, vec![End]), (Place::End, vec![Table, Directory, Footer, End])] {
        let bytes = stream(SECTORS, place, &[&three(GRAIN)[..], &tail].concat());
        // Without its end marker, only a stream with tables in front is known to be complete: from the end of
        // its last grain on, whose padding has 484 bytes.
        let complete = if place == Place::Front { bytes.len() - 512 - 484 } else { bytes.len() };
        for len in (4096..bytes.len()).step_by(512).chain([complete - 1, complete, bytes.len() - 1]) {
            for read in [from_pipe(&bytes[..len]), open_bytes(&bytes[..len])] {
                assert_eq!(read.is_ok(), len >= complete, "{len} of {}", bytes.len());
            }
        }
    }
}

#[test]
fn missing_and_moved_grains_contradict_the_tables() {
    use Part::{Bytes, Directory, End, Footer, Grain, Table};
    let tail = [Table, Directory, Footer, End];
    let whole = stream(SECTORS, Place::End, &[&three(GRAIN)[..], &tail].concat());
    // The first grain takes 65 547 + 12 bytes: 129 sectors.
    let without_one = [&whole[..65_536], &whole[65_536 + 129 * 512..]].concat();
    assert_fault(&without_one, ErrorKind::Corrupt, "contradicts");
    let front = stream(SECTORS, Place::Front, &[&three(GRAIN)[..], &[End]].concat());
    assert_fault(
        &[&front[..65_536], &front[65_536 + 129 * 512..]].concat(),
        ErrorKind::Corrupt,
        "contradicts",
    );
    let mut early = front.clone();
    early.truncate(front.len() - 130 * 512);
    early.extend(vec![0; 512]);
    assert_fault(&early, ErrorKind::Corrupt, "1 grains of its tables are missing");
    let no_footer = stream(SECTORS, Place::End, &[&three(GRAIN)[..], &[Table, Directory, End]].concat());
    assert_fault(&no_footer, ErrorKind::Corrupt, "without its directory and footer");
    let twice = [Grain(1, data(1)), Grain(1, data(1)), End];
    assert_fault(&stream(SECTORS, Place::End, &twice), ErrorKind::OutOfOrder, "comes after");
    let beyond = [Grain(5, data(1)), End];
    assert_fault(&stream(SECTORS, Place::End, &beyond), ErrorKind::Corrupt, "no grain");
    let more = [&three(GRAIN)[..], &tail, &[Bytes(vec![7; 10])]].concat();
    let more = stream(SECTORS, Place::End, &more);
    assert_fault(&more, ErrorKind::Corrupt, "follow the end");
    let options = OpenOptions { ignore_trailing: true, ..OpenOptions::default() };
    assert!(from_pipe_with(&more, &options).unwrap() == expected());
}

#[test]
fn damaged_grains_are_errors_and_salvage_keeps_the_others() {
    use Part::{Directory, End, Footer, Grain, Table};
    let mut parts = three(GRAIN).to_vec();
    parts.extend([Table, Directory, Footer, End]);
    let whole = stream(SECTORS, Place::End, &parts);
    let mut damaged = whole.clone();
    damaged[65_536 + 5000] ^= 1;
    let mut moved = whole.clone();
    moved[65_536 + 1] = 1;
    let mut long = whole.clone();
    long[65_536 + 10] = 4;
    for (bytes, text) in [(&damaged, "damaged"), (&moved, "marker of grain 1"), (&long, "limit is twice")] {
        let error = open_bytes(bytes).unwrap_err();
        assert!(
            error.kind() == ErrorKind::Corrupt && error.to_string().contains(text),
            "{error}, not {text}"
        );
        assert!(from_pipe(bytes).is_err());
    }
    let more = stream(SECTORS, Place::End, &[Grain(1, vec![1; GRAIN + 1]), Table, Directory, Footer, End]);
    assert!(open_bytes(&more).unwrap_err().to_string().contains("more than"));
    let less = stream(SECTORS, Place::End, &[Grain(1, vec![1; GRAIN - 1]), Table, Directory, Footer, End]);
    assert!(open_bytes(&less).unwrap_err().to_string().contains("65535 bytes of 65536"));
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let kept = [grains(&[0, 0, 0, 2]), vec![3; 51_200]].concat();
    assert!(from_pipe_with(&damaged, &options).unwrap() == kept);
}

/// Result of a salvage: the content, the number of lost bytes, and true if it states a doubt.
type Salvaged = (Vec<u8>, u64, bool);

fn restored(source: &Arc<dyn ImageSource>, content: Vec<u8>) -> Salvaged {
    let lost = source.losses().iter().map(|loss| loss.guest.end - loss.guest.start).sum();
    (content, lost, !source.doubts().is_empty())
}

/// Salvages a stream from a file, and from a pipe.
fn salvaged(bytes: &[u8]) -> [Salvaged; 2] {
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let file = VmdkDriver.open(memory::as_file("x.vmdk", bytes), &options).unwrap();
    let pipe = VmdkDriver.open(memory::as_stream("x.vmdk", bytes), &options).unwrap();
    let found = content(&file).unwrap();
    let passed = all_pieces(&pipe).unwrap();
    [restored(&file, found), restored(&pipe, passed)]
}

/// Returns streams of two tables and six grains, with the tables in front and behind, and the sector of each
/// of their grains.
fn two_tables() -> [(Vec<u8>, Vec<u64>); 2] {
    let first: Vec<Part> = (0..3).map(|grain| Part::Grain(2 * grain, data(grain as u8 + 1))).collect();
    let behind = [&first[..], &[Part::Table, Part::Directory, Part::Footer, Part::End]].concat();
    let sectors: Vec<u64> = (0..3).map(|grain| 128 + 129 * grain).collect();
    [
        (stream(6 * 128, Place::Front, &[&first[..], &[Part::End]].concat()), sectors.clone()),
        (stream(6 * 128, Place::End, &behind), sectors),
    ]
}

/// Every grain has its place in its marker, so a salvage needs no table.
#[test]
fn salvage_reads_by_the_markers_if_tables_are_damaged() {
    let whole = grains(&[1, 0, 2, 0, 3, 0]);
    for (number, (bytes, sectors)) in two_tables().into_iter().enumerate() {
        for (content, lost, doubt) in salvaged(&bytes) {
            assert!(content == whole && lost == 0 && !doubt, "{number}: {lost} {doubt}");
        }
        // Directory and table, each overwritten with ones, and an entry of the table with a flipped bit.
        let behind = sectors.last().unwrap() + 129;
        let (table, directory) = if number == 0 { (40, 39) } else { (behind + 1, behind + 6) };
        for damaged in [
            overwritten(&bytes, directory * 512, &[0xff; 512]),
            overwritten(&bytes, directory * 512, &[0; 512]),
            overwritten(&bytes, table * 512, &[0xff; 2048]),
            overwritten(&bytes, table * 512, &[0; 2048]),
            overwritten(&bytes, table * 512 + 16, &[0x81]),
            overwritten(&bytes, table * 512 + 17, &[0xff]),
        ] {
            assert!(open_bytes(&damaged).is_err() || open_bytes(&damaged).unwrap() != whole || number == 0);
            for (content, lost, doubt) in salvaged(&damaged) {
                assert!(content == whole, "{number}");
                assert!(doubt && lost <= 3 * 65_536, "{number}: {lost} {doubt}");
            }
        }
    }
}

#[test]
fn salvage_finds_the_next_marker_behind_a_damaged_one() {
    for (number, (bytes, sectors)) in two_tables().into_iter().enumerate() {
        let at = sectors[1] * 512;
        let zeros = [0; 4096];
        for damaged in [
            // The sector, the length, everything before the compressed bytes, and a part of the grain before.
            overwritten(&bytes, at + 1, &[7]),
            overwritten(&bytes, at + 8, &[1, 2, 0, 0]),
            overwritten(&bytes, at, &[0x55; 14]),
            overwritten(&bytes, at, &zeros),
            overwritten(&bytes, at - 2048, &zeros),
        ] {
            for (content, lost, _) in salvaged(&damaged) {
                let kept: Vec<u8> = content.chunks(GRAIN).map(|grain| grain[0]).collect();
                assert!(kept[4] == 3 && kept[1] == 0 && kept[2] == 0, "{number}: {kept:?}");
                assert!((65_536..=4 * 65_536).contains(&lost), "{number}: {lost} of {kept:?}");
            }
        }
        // A length that reaches over the next grain. A file has that one at its place; a pipe has passed it.
        let [(file, lost, _), (pipe, lost_of_pipe, _)] =
            salvaged(&overwritten(&bytes, at + 8, &[0xff, 0xff, 1, 0]));
        assert!(file == grains(&[1, 0, 2, 0, 3, 0]) && lost == 0, "{number}: {lost}");
        assert!(pipe == grains(&[1, 0, 2, 0, 0, 0]) && lost_of_pipe >= 65_536, "{number}: {lost_of_pipe}");
    }
}

#[test]
fn salvage_of_a_cut_stream_loses_what_follows() {
    for (number, (bytes, sectors)) in two_tables().into_iter().enumerate() {
        for cut in [sectors[2] * 512, sectors[2] * 512 + 5000] {
            for (content, lost, doubt) in salvaged(&bytes[..cut as usize]) {
                assert!(content == grains(&[1, 0, 2, 0, 0, 0]), "{number}");
                // The tables in front list the grain that is missing.
                let expected = if number == 0 { 65_536 } else { 3 * 65_536 };
                assert!(lost == expected && (doubt || number == 0), "{number}: {lost} {doubt}");
            }
        }
        // Without its end marker, a stream is complete only if its tables are in front.
        for (content, lost, doubt) in salvaged(&bytes[..bytes.len() - 512]) {
            assert!(content == grains(&[1, 0, 2, 0, 3, 0]));
            assert!(doubt == (number == 1) && lost <= 65_536, "{number}: {lost} {doubt}");
        }
    }
}

fn overwritten(bytes: &[u8], at: u64, with: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at as usize..][..with.len()].copy_from_slice(with);
    bytes
}

#[test]
fn a_directory_without_its_marker_is_refused() {
    use Part::{Directory, End, Footer, Table};
    let parts = [&three(GRAIN)[..], &[Table, Directory, Footer, End]].concat();
    // The first bytes of a grain's marker would be an empty directory.
    let mut bytes = stream(SECTORS, Place::Known, &parts);
    bytes[56..64].copy_from_slice(&128u64.to_le_bytes());
    assert!(open_bytes(&bytes).unwrap_err().to_string().contains("no marker"));
    assert_fault(&bytes, ErrorKind::Corrupt, "in the header");
}

/// Walks over the markers of a stream, and returns the guest sectors of its grains.
fn walk(bytes: &[u8]) -> Vec<u64> {
    let number = |at: usize, len: usize| {
        bytes[at..at + len].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let (mut at, mut grains) = (number(64, 8) as usize * 512, Vec::new());
    let grain = number(20, 8) as usize * 512;
    loop {
        let (value, len, kind) = (number(at, 8), number(at + 8, 4) as usize, number(at + 12, 4));
        if len > 0 {
            grains.push(value);
            let end = at + 12 + len;
            // Even a grain that the disk cuts is whole: VirtualBox refuses others.
            let mut content = vec![0xee; grain + 1];
            let inflated = Decompressor::new().zlib_decompress(&bytes[at + 12..end], &mut content);
            assert_eq!(inflated, Ok(grain), "the grain of sector {value}");
            assert!(bytes[end..end.next_multiple_of(512)].iter().all(|byte| *byte == 0), "padding at {end}");
            at = end.next_multiple_of(512);
            continue;
        }
        if kind == 0 {
            assert_eq!((value, at + 512), (0, bytes.len()), "the end marker is not the last sector");
            return grains;
        }
        at += 512 + value as usize * 512;
    }
}

#[test]
fn ours_ends_with_its_marker_and_is_what_importers_take() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(make(&small(), &[], directory.path())).unwrap();
    assert_eq!(&bytes[4..12], &[3, 0, 0, 0, 1, 0, 3, 0]);
    assert_eq!(&bytes[12..28], &[0, 0xa0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[56..72], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 128, 0, 0, 0, 0, 0, 0, 0]);
    let grains = walk(&bytes);
    assert!(grains.is_sorted() && grains.len() == 1 + 16 + 16 + 1, "{grains:?}");
    // The disk ends within a grain, which is in the file.
    let content = Content::zero().with(0..100, Fill::Text).with(65_536..70_000, Fill::Random);
    let ragged = Image::disk("ragged", 70_144, content);
    let bytes = std::fs::read(make(&ragged, &[], directory.path())).unwrap();
    assert_eq!(walk(&bytes), [0, 128]);
    assert!(open_bytes(&bytes).unwrap().len() == 70_144);
}

/// Returns the descriptor of an image that is made with these options, with its content identifier replaced.
#[track_caller]
fn descriptor_of(options: &[(&str, &str)]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(make(&small(), options, directory.path())).unwrap();
    let text = if bytes.starts_with(b"KDMV") { &bytes[512..21 * 512] } else { &bytes[..] };
    let text = std::str::from_utf8(text).unwrap().trim_end_matches('\0').to_owned();
    let value = |key: &str| text.split_once(key).unwrap().1.split(['\n', '"']).next().unwrap().to_owned();
    let (cid, long) = (value("\nCID="), value("longContentID = \""));
    assert!(cid.len() == 8 && u32::from_str_radix(&cid, 16).unwrap() < 0xffff_fffe, "{cid}");
    assert!(long.len() == 32 && long.ends_with(&cid), "{long} does not end in {cid}");
    text.replace(&long, "LONG").replace(&cid, "ID")
}

#[test]
fn ours_has_the_descriptor_that_importers_take() {
    let expected = "# Disk DescriptorFile\nversion=1\nCID=ID\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
        # Extent description\nRW 40960 SPARSE \"any name.vmdk\"\n\n# The Disk Data Base\n#DDB\n\n\
        ddb.adapterType = \"lsilogic\"\nddb.encoding = \"UTF-8\"\nddb.geometry.cylinders = \"3\"\n\
        ddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.longContentID = \"LONG\"\n\
        ddb.virtualHWVersion = \"13\"\n";
    assert_eq!(descriptor_of(&[]), expected);
    let options =
        [("subformat", "vmfs"), ("adapter_type", "ide"), ("hwversion", "10"), ("toolsversion", "10309")];
    let expected = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=ID\nparentCID=ffffffff\n\
        createType=\"vmfs\"\n\n# Extent description\nRW 40960 VMFS \"any name-flat.vmdk\"\n\n\
        # The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\nddb.encoding = \"UTF-8\"\n\
        ddb.geometry.cylinders = \"41\"\nddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\n\
        ddb.longContentID = \"LONG\"\nddb.toolsVersion = \"10309\"\nddb.virtualHWVersion = \"10\"\n";
    assert_eq!(descriptor_of(&options), expected);
}

#[test]
fn a_single_file_names_itself_and_a_stream_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let line = |name: &str| {
        let path = directory.path().join(name);
        let mut outputs = conformance::FileOutputs::new(&path);
        conformance::write_to(&VmdkDriver, &options(&[]), &small(), &mut outputs, 1).unwrap();
        let bytes = std::fs::read(path).unwrap();
        String::from_utf8_lossy(&bytes[512..21 * 512]).lines().nth(7).unwrap().to_owned()
    };
    assert_eq!(line("\u{e4} b.vmdk"), "RW 40960 SPARSE \"\u{e4} b.vmdk\"");
    // A name that a descriptor can't contain.
    assert_eq!(line("a\"b.vmdk"), "RW 40960 SPARSE \"disk.vmdk\"");
}

#[test]
fn zeroed_grains_are_refused_by_name_in_flat_images() {
    let directory = tempfile::tempdir().unwrap();
    let mut outputs = conformance::FileOutputs::new(&directory.path().join("x.vmdk"));
    let options = options(&[("zeroed_grain", "on"), ("subformat", "monolithicFlat")]);
    let error = conformance::write_to(&VmdkDriver, &options, &small(), &mut outputs, 1).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("zeroed_grain"), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn ours_is_no_larger_than_that_of_qemu() {
    if !oracles::have("qemu-img") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (raw, theirs) = (directory.path().join("x.raw"), directory.path().join("x.vmdk"));
    conformance::mixed_image().write_raw(&raw);
    oracles::qemu_make(&raw, "vmdk", "subformat=streamOptimized", &theirs);
    let ours = make(&conformance::mixed_image(), &[], directory.path());
    let len = |path: &std::path::Path| std::fs::metadata(path).unwrap().len();
    assert!(len(&ours) <= len(&theirs), "{} and {}", len(&ours), len(&theirs));
}

#[test]
fn nothing_of_a_disk_follows_its_directory() {
    use Part::{Directory, End, Footer, Grain, Table};
    // Two tables; the second has a grain behind the footer, which no table lists.
    let late = Grain(512, data(9));
    for place in [Place::End, Place::Known] {
        for parts in [
            [Grain(0, data(1)), Table, Directory, Footer, late.clone(), End].to_vec(),
            [Grain(0, data(1)), Table, Directory, late.clone(), Footer, End].to_vec(),
            [Grain(0, data(1)), Table, Directory, Directory, Footer, End].to_vec(),
            [Grain(0, data(1)), Table, Directory, Part::EmptyTable, Footer, End].to_vec(),
        ] {
            assert_fault(&stream(2 * 65_536, place, &parts), ErrorKind::Corrupt, "contradicts");
        }
        let parts = [Grain(0, data(1)), Table, Directory, late.clone(), Footer, End];
        let error = open_bytes(&stream(2 * 65_536, place, &parts)).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("does not follow its directory"), "{error}");
        let parts = [Grain(0, data(1)), Table, Directory, Footer, late.clone(), End];
        let error = open_bytes(&stream(2 * 65_536, place, &parts)).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("follow the end of the stream"), "{error}");
    }
}

#[test]
fn salvage_by_position_loses_only_the_damaged_grain() {
    use Part::{Directory, End, Footer, Grain, Table};
    let mut parts: Vec<Part> = (0..8).map(|grain| Grain(grain, data(grain as u8 + 1))).collect();
    parts.extend([Table, Directory, Footer, End]);
    let mut bytes = stream(8 * 128, Place::End, &parts);
    bytes[65_536 + 3 * 129 * 512 + 5000] ^= 1;
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = VmdkDriver.open(memory::as_file("x.vmdk", &bytes), &options).unwrap();
    let kept = grains(&[1, 2, 3, 0, 5, 6, 7, 8]);
    assert!(content(&source).unwrap() == kept);
    let losses = source.losses();
    assert!(losses.len() == 1 && losses[0].guest == (3 * 65_536..4 * 65_536), "{losses:?}");
    assert!(from_pipe_with(&bytes, &options).unwrap() == kept);
}

#[test]
fn a_stream_and_a_file_agree_about_the_descriptor() {
    use Part::{Directory, End, Footer, Table};
    let parts = [&three(GRAIN)[..], &[Table, Directory, Footer, End]].concat();
    for (line, text) in [
        ("", "no extent"),
        ("RW 300 SPARSE \"x\"\nRW 312 SPARSE \"y\"", "more than one extent"),
        ("RW 613 SPARSE \"x\"", "613 sectors"),
        ("RW 384 SPARSE \"x\"", "384 sectors"),
        ("RW 612 SPARSE \"x\"\nparentFileNameHint=\"a\"", "names a parent, 'a'"),
    ] {
        let mut bytes = stream(SECTORS, Place::End, &parts);
        let descriptor = format!("# Disk DescriptorFile\nCID=7\nparentCID=ffffffff\n{line}\n");
        bytes[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
        bytes[28] = 1;
        bytes[36] = 20;
        for error in [open_bytes(&bytes), from_pipe(&bytes)].map(|read| read.map(|_| ()).unwrap_err()) {
            assert!(error.to_string().contains(text), "{line}: {error}");
        }
    }
    // The capacity of the header is rounded up.
    let mut bytes = stream(5 * 128, Place::End, &parts);
    let descriptor = format!("# Disk DescriptorFile\nCID=7\nparentCID=ffffffff\nRW {SECTORS} SPARSE \"x\"\n");
    bytes[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
    bytes[28] = 1;
    bytes[36] = 20;
    for read in [open_bytes(&bytes), from_pipe(&bytes)] {
        assert!(read.unwrap() == expected());
    }
}

/// VirtualBox states no content identifier of a parent.
#[test]
fn refuses_a_virtualbox_snapshot_in_a_stream() {
    use Part::{Directory, End, Footer, Table};
    let parts = [&three(GRAIN)[..], &[Table, Directory, Footer, End]].concat();
    let mut bytes = stream(SECTORS, Place::End, &parts);
    let descriptor = format!(
        "# Disk DescriptorFile\nCID=7\nparentCID=ffffffff\nRW {SECTORS} SPARSE \"x\"\n\
         ddb.uuid.parent=\"5c2a1d1b-5b5b-4b86-9a7e-6ff4b0f1a001\"\n"
    );
    bytes[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
    bytes[28] = 1;
    bytes[36] = 20;
    let error = from_pipe(&bytes).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("a snapshot can't be read from a stream"), "{error}");
}

/// The owner of a backup checks it, and reads it years later.
#[test]
fn check_decodes_every_grain() {
    let directory = tempfile::tempdir().unwrap();
    for (number, (bytes, sectors)) in two_tables().into_iter().enumerate() {
        let path = save(directory.path(), "x.vmdk", &bytes);
        assert_eq!(check(&path).findings, [""; 0], "{number}");
        let mut damaged = bytes.clone();
        damaged[sectors[0] as usize * 512 + 300] ^= 1;
        damaged[sectors[2] as usize * 512 + 300] ^= 1;
        let path = save(directory.path(), "x.vmdk", &damaged);
        let report = check(&path);
        assert_eq!(report.corruptions, 2, "{number}: {:?}", report.findings);
        assert!(
            report.findings[1].contains("grain 4: a compressed grain is damaged"),
            "{:?}",
            report.findings
        );
    }
}

#[test]
fn check_tells_an_end_marker_from_the_end_of_a_grain() {
    let directory = tempfile::tempdir().unwrap();
    // Stored blocks of zeros: the last sectors of the grain look like markers.
    let mut grain = data(0);
    grain[0] = 1;
    for (parts, has_end) in
        [(vec![Part::Grain(0, grain.clone())], false), (vec![Part::Grain(0, grain), Part::End], true)]
    {
        let mut bytes = stream(128, Place::Front, &parts);
        if !has_end {
            // Cut in the padding, so that the last whole sector is one of zeros.
            bytes.truncate(bytes.len() - 400);
        }
        let path = save(directory.path(), "x.vmdk", &bytes);
        let findings = check(&path).findings;
        assert_eq!(findings.is_empty(), has_end, "{findings:?}");
    }
}

/// The header tells the size and the variant, whatever became of the rest.
#[test]
fn facts_of_a_cut_stream_are_those_of_its_header() {
    let [_, (bytes, _)] = two_tables();
    let options = OpenOptions { info_only: true, ..OpenOptions::default() };
    let source = VmdkDriver.open(memory::as_file("x.vmdk", &bytes[..200_000]), &options).unwrap();
    assert_eq!(source.info().devices[0].size, 6 * 65_536);
    assert_eq!(source.info().cluster_size, Some(65_536));
    assert!(source.damage().unwrap().to_string().contains("no footer"), "{:?}", source.damage());
    let whole = VmdkDriver.open(memory::as_file("x.vmdk", &bytes), &options).unwrap();
    assert!(whole.damage().is_none());
}
