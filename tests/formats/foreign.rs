//! Images that Windows, macOS and Parallels Desktop made, which no program at hand makes (`fixtures/MANIFEST.md`).

use std::path::Path;

use imgtool_testing::{fixture, oracles, require, sha256_file, tempdir, text};

use crate::support::imgtool;

/// Parent, child, and the digests of their content.
const CHAINS: [(&str, &str, [&str; 2]); 2] = [
    (
        "fat-parent.vhd",
        "fat-differential.vhd",
        [
            "bbdb657bc5aa2fde44e2456149f9257a862cb84f4668e338b90e357b0fbdf118",
            "f4b61a33ee2f7e8c19f737792a4107e46340026a9a829e4169b751901cc3ef02",
        ],
    ),
    (
        "fat-parent.vhdx",
        "fat-differential.vhdx",
        [
            "2d1954fec68faefe81dd3687282a9b387bf8417f6d2cf0da3825fa1445b64cfb",
            "a538161f34bc44c12bf9a542ce9218741c62728723ea18d0e4f6ea92e9f32e93",
        ],
    ),
];

/// Unpacks a fixture into a directory.
fn unpack(directory: &Path, name: &str) {
    let packed = fixture("others").join(format!("{name}.zst"));
    oracles::run("zstd", &["-q", "-d", text(&packed), "-o", text(&directory.join(name))]);
}

/// The parent has an absolute Windows path and a relative one, and sectors that alternate between both files.
#[test]
fn reads_children_of_windows_over_their_parents() {
    require!("zstd", "7zz");
    for (parent, child, digests) in CHAINS {
        let dir = tempdir();
        unpack(dir.path(), parent);
        unpack(dir.path(), child);
        for (name, digest) in [parent, child].into_iter().zip(digests) {
            let raw = dir.path().join(format!("{name}.raw"));
            let line = ["convert", "--allow-external", "chain", "--verify", name, text(&raw)];
            imgtool(line).within(dir.path()).ok();
            assert_eq!(sha256_file(&raw), digest, "{name}");
            imgtool(["check", "--allow-external", "chain", name]).within(dir.path()).ok();
        }
        let format = parent.rsplit('.').next().unwrap();
        let seen = oracles::seven_zip(&dir.path().join(child), format);
        assert!(seen == std::fs::read(dir.path().join(format!("{child}.raw"))).unwrap(), "{child}");
        imgtool(["convert", child, "out.raw"]).within(dir.path()).go().exits(1).says(parent);
        let info = imgtool(["info", "--backing-chain", "--allow-external", "chain", child]);
        let text = info.within(dir.path()).ok().text();
        assert!(text.matches(parent).count() > 1, "{text}");
    }
}

#[test]
fn children_over_parents_of_windows_are_read_alike() {
    require!("zstd", "7zz");
    for (parent, child, _) in CHAINS {
        let dir = tempdir();
        unpack(dir.path(), parent);
        unpack(dir.path(), child);
        let format = parent.rsplit('.').next().unwrap();
        let line =
            ["convert", "--allow-external", "chain", "--verify", "-B", parent, "-F", format, "-O", format];
        imgtool(line).args([child, "ours"]).within(dir.path()).ok();
        imgtool(["compare", "--allow-external", "chain", "ours", child]).within(dir.path()).ok();
        let [ours, theirs] = ["ours", child].map(|name| oracles::seven_zip(&dir.path().join(name), format));
        assert!(ours == theirs, "{child}");
    }
}

#[test]
fn reads_images_of_macos_and_parallels_desktop() {
    require!("zstd");
    let dir = tempdir();
    unpack(dir.path(), "hfsplus.hds");
    let dmg = fixture("others").join("hfsplus_zlib.dmg");
    let hds = dir.path().join("hfsplus.hds");
    for (image, digest) in [
        (&dmg, "c86d3616818e175caca2f6022f49e190e5b1cfe39b2e8f9373119e22aa7eaf58"),
        (&hds, "b5d1c3bb34c26e20976ba041e742c7529cce93b9cb00b435ba5c4af3e652a1e1"),
    ] {
        let raw = dir.path().join("out.raw");
        imgtool(["convert", "--force", text(image), text(&raw)]).ok();
        assert_eq!(sha256_file(&raw), digest, "{}", image.display());
        imgtool(["check", text(image)]).ok();
    }
}
