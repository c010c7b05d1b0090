//! Servers that break the protocol: each reply is cut, and each of its bytes is changed.

use std::io::{self, Cursor, Read, Write};

use imgtool_core::ErrorKind;
use imgtool_nbd::wire;

/// A stream whose other side sends fixed bytes.
struct Script(Cursor<Vec<u8>>);

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u32).to_be_bytes();
    [&0x0003_e889_0455_65a9u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes(), &len, data]
        .concat()
}

/// The server's part of a negotiation of 1 MiB with extents.
fn negotiation() -> Vec<u8> {
    let context = [&7u32.to_be_bytes()[..], b"base:allocation"].concat();
    let export = [&0u16.to_be_bytes()[..], &(1u64 << 20).to_be_bytes(), &0x103u16.to_be_bytes()].concat();
    let blocks =
        [&3u16.to_be_bytes()[..], &1u32.to_be_bytes(), &4096u32.to_be_bytes(), &(32u32 << 20).to_be_bytes()];
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        reply(8, 1, &[]),
        reply(10, 4, &context),
        reply(10, 1, &[]),
        reply(7, 3, &export),
        reply(7, 3, &blocks.concat()),
        reply(7, 1, &[]),
    ]
    .concat()
}

fn chunk(is_last: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u32).to_be_bytes();
    let flags = u16::from(is_last).to_be_bytes();
    [&0x668e_33efu32.to_be_bytes()[..], &flags, &kind.to_be_bytes(), &5u64.to_be_bytes(), &len, payload]
        .concat()
}

fn data(at: u64, bytes: &[u8]) -> Vec<u8> {
    [&at.to_be_bytes()[..], bytes].concat()
}

fn hole(at: u64, len: u32) -> Vec<u8> {
    [&at.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn export() -> wire::Export {
    wire::negotiate(&mut Script(Cursor::new(negotiation())), "disk").unwrap()
}

/// Reads 1024 bytes at 4096 from a server that sends `chunks`.
fn read(chunks: &[Vec<u8>]) -> Result<Vec<u8>, imgtool_core::Error> {
    let mut buf = vec![9; 1024];
    let mut script = Script(Cursor::new(chunks.concat()));
    wire::read_at(&mut script, &export(), 5, &mut buf, 4096).map(|()| buf)
}

#[test]
fn negotiates_size_blocks_and_extents() {
    let export = export();
    assert_eq!((export.size, export.block, export.payload), (1 << 20, 1, 32 << 20));
    assert!(export.multi_conn && export.has_extents());
}

#[test]
fn takes_parts_in_any_order() {
    let parts =
        [chunk(false, 1, &data(4608, &[1; 512])), chunk(false, 2, &hole(4096, 512)), chunk(true, 0, &[])];
    assert_eq!(read(&parts).unwrap(), [vec![0; 512], vec![1; 512]].concat());
}

#[test]
fn refuses_parts_that_nobody_asked_for() {
    let whole = data(4096, &[1; 1024]);
    for (what, parts) in [
        ("a part is missing", vec![chunk(true, 1, &data(4096, &[1; 512]))]),
        ("nothing", vec![chunk(true, 0, &[])]),
        ("twice", vec![chunk(false, 1, &whole), chunk(true, 1, &whole)]),
        ("overlap", vec![chunk(false, 2, &hole(4096, 513)), chunk(true, 1, &data(4608, &[1; 512]))]),
        ("before", vec![chunk(true, 1, &data(4095, &[1; 1024]))]),
        ("after", vec![chunk(true, 1, &data(4097, &[1; 1024]))]),
        ("around the end", vec![chunk(true, 2, &hole(u64::MAX, 1024))]),
        ("long hole", vec![chunk(true, 2, &hole(4096, u32::MAX))]),
        ("empty", vec![chunk(true, 2, &hole(4096, 0))]),
        ("of extents", vec![chunk(true, 5, &whole)]),
        ("unknown", vec![chunk(true, 99, &whole)]),
        (
            "simple",
            vec![[&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &5u64.to_be_bytes(), &[1; 1024]].concat()],
        ),
    ] {
        assert_eq!(read(&parts).unwrap_err().kind(), ErrorKind::Malformed, "{what}");
    }
    let error = [&5u32.to_be_bytes()[..], &[0, 2], b"no"].concat();
    assert_eq!(
        read(&[chunk(false, 1, &whole), chunk(true, 0x8001, &error)]).unwrap_err().kind(),
        ErrorKind::Io
    );
    // Chunks that bring nothing, without end.
    assert_eq!(
        read(&[chunk(false, 0, &[]), chunk(true, 1, &whole)]).unwrap_err().kind(),
        ErrorKind::Malformed
    );
    let errors = vec![chunk(false, 0x8001, &error); 65];
    assert_eq!(read(&errors).unwrap_err().kind(), ErrorKind::Malformed);
    let many = vec![chunk(false, 2, &hole(4096, 1)); 1];
    let many: Vec<Vec<u8>> = (0..200).map(|at| chunk(false, 2, &hole(4096 + at, 1))).chain(many).collect();
    assert_eq!(read(&many).unwrap_err().kind(), ErrorKind::LimitExceeded);
}

#[test]
fn extents_are_cut_at_what_was_asked_for() {
    let status = |extents: &[(u32, u32)]| {
        let list = extents.iter().flat_map(|(len, state)| [len.to_be_bytes(), state.to_be_bytes()].concat());
        chunk(true, 5, &[7u32.to_be_bytes().to_vec(), list.collect()].concat())
    };
    let ask = |bytes: Vec<u8>| {
        let found = wire::extents(&mut Script(Cursor::new(bytes)), &export(), 5, 0..8192)?;
        Ok::<_, imgtool_core::Error>(
            found.iter().map(|extent| (extent.len, extent.is_zero)).collect::<Vec<_>>(),
        )
    };
    // A hole that is not zero has unknown content, and must be read.
    assert_eq!(ask(status(&[(4096, 3), (u32::MAX, 1), (1, 2)])).unwrap(), [(4096, true), (4096, false)]);
    assert_eq!(ask(status(&[(512, 0)])).unwrap(), [(512, false)]);
    for wrong in [
        status(&[]),
        status(&[(0, 0)]),
        chunk(true, 0, &[]),
        chunk(true, 5, &[0; 12]),
        chunk(true, 5, &[0; 3]),
    ] {
        assert_eq!(ask(wrong).unwrap_err().kind(), ErrorKind::Malformed);
    }
}

#[test]
fn survives_any_change_of_a_reply() {
    let good = negotiation();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            if let Ok(export) = wire::negotiate(&mut Script(Cursor::new(bad)), "disk") {
                assert!(export.block.is_power_of_two() && export.payload >= export.block);
            }
        }
        assert!(wire::negotiate(&mut Script(Cursor::new(good[..at].to_vec())), "disk").is_err());
    }
    let good = [chunk(false, 1, &data(4096, &[1; 512])), chunk(true, 2, &hole(4608, 512))].concat();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let _ = read(&[bad]);
        }
        assert!(read(&[good[..at].to_vec()]).is_err());
    }
}
