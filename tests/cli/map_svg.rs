//! `imgtool map --output svg`, as a browser shows it.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::Archive;
use imgtool_testing::{oracles, require, tempdir, text};
use serde_json::{Value, json};

use crate::support::imgtool;

/// A page that parses a document strictly, shows it, and replaces itself by what it has measured: errors of
/// the parser, texts, texts beyond the edge or over others, elements, references, colours of some places.
const PAGE: &str = r#"<!DOCTYPE html><meta charset="utf-8"><body><script>
const source = SOURCE, places = PLACES;
const parsed = new DOMParser().parseFromString(source, 'image/svg+xml');
const svg = document.body.appendChild(document.importNode(parsed.documentElement, true));
const all = [...svg.querySelectorAll('*')], frame = svg.getBoundingClientRect();
const texts = all.filter(e => e.localName == 'text').map(e => [e.textContent, e.getBoundingClientRect()]);
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
const found = {
  errors: parsed.querySelectorAll('parsererror').length,
  texts: texts.map(([text]) => text),
  outside: texts.filter(([, b]) => b.left < frame.left || b.right > frame.right).map(([text]) => text),
  overlapping: texts.filter(([, a], i) => texts.some(([, b], j) => i < j && !apart(a, b)))
    .map(([text]) => text),
  names: [...new Set(all.map(e => e.localName))].sort(),
  elements: all.length,
  links: [...source.matchAll(/(?:href|src|url)[=(][^)\s]*/g)].map(([link]) => link)
    .filter(link => !link.startsWith('url(#')),
  titles: [...svg.querySelectorAll('.run title')].slice(0, 9).map(e => e.textContent),
};
const picture = new Image();
picture.onload = () => {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  found.colours = places.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)]);
  document.body.textContent = encodeURIComponent(JSON.stringify(found));
};
picture.src = 'data:image/svg+xml,' + encodeURIComponent(source);
</script>"#;

/// Shows a document in Chromium and returns what [`PAGE`] has measured.
fn browse(svg: &str, places: &[(u32, u32)], settings: &[&str]) -> Value {
    let directory = tempdir();
    let page = directory.path().join("page.html");
    let source = json!(svg).to_string().replace('<', "\\u003c");
    std::fs::write(&page, PAGE.replace("PLACES", &json!(places).to_string()).replace("SOURCE", &source))
        .unwrap();
    let profile = format!("--user-data-dir={}", text(&directory.path().join("profile")));
    let url = format!("file://{}", text(&page));
    let mut line = vec![
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        &profile,
        "--virtual-time-budget=10000",
        "--dump-dom",
    ];
    line.extend(settings);
    line.push(&url);
    let output = oracles::try_run("chromium", &line);
    let dom = String::from_utf8_lossy(&output.stdout);
    let body =
        dom.split_once("<body>").and_then(|(_, rest)| rest.split_once("</body>")).map(|(body, _)| body);
    let measured = body.unwrap_or_else(|| panic!("{dom}\n{}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_slice(&decode(measured)).unwrap_or_else(|e| panic!("{e}: {dom}"))
}

/// Undoes `encodeURIComponent`.
fn decode(text: &str) -> Vec<u8> {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at(2);
        bytes.push(u8::from_str_radix(code, 16).unwrap());
        bytes.extend(rest.as_bytes());
    }
    bytes
}

/// Returns the drawing of the image `name` in `directory`.
fn drawing(directory: &Path, line: &str) -> String {
    imgtool(["map", "--output", "svg"]).args(line.split(' ')).within(directory).ok().text()
}

/// Asserts that a document is valid, complete in itself, and legible.
#[track_caller]
fn assert_sound(found: &Value) {
    assert_eq!(found["errors"], 0, "{found}");
    assert_eq!(found["outside"], json!([]), "{found}");
    assert_eq!(found["overlapping"], json!([]), "{found}");
    assert_eq!(found["links"], json!([]), "{found}");
    let known = ["circle", "defs", "desc", "g", "path", "pattern", "rect", "style", "svg", "text", "title"];
    let names = found["names"].as_array().unwrap();
    assert!(names.iter().all(|name| known.contains(&name.as_str().unwrap())), "{names:?}");
}

/// Creates a disk of 8 MiB with 1 MiB of data at 2 MiB, as raw and as compressed qcow2.
fn workshop() -> tempfile::TempDir {
    let directory = tempdir();
    Image::hole("x", 8 << 20)
        .with(2 << 20, images::prose(1, 1 << 20))
        .write_raw(&directory.path().join("disk.raw"));
    for line in ["convert -q disk.raw disk.qcow2", "convert -q -c disk.raw small.qcow2"] {
        imgtool(line.split(' ')).within(directory.path()).ok();
    }
    directory
}

/// Returns a place in the square of a guest offset in the first disk of a drawing, whose squares are 4 KiB.
fn square(offset: u32) -> (u32, u32) {
    let index = offset / 4096;
    (72 + index % 128 * 7 + 1, 204 + index / 128 * 7 + 3)
}

#[test]
fn browsers_show_data_and_holes_in_their_places() {
    require!("chromium");
    let directory = workshop();
    let places =
        [square(0), square((2 << 20) - 4096), square(2 << 20), square((3 << 20) - 4096), square(3 << 20)];
    let (blue, orange, white) = (json!([0, 114, 178]), json!([196, 106, 0]), json!([255, 255, 255]));
    for (name, colour) in [("disk.qcow2", &blue), ("small.qcow2", &orange)] {
        let found = browse(&drawing(directory.path(), name), &places, &[]);
        assert_sound(&found);
        assert_eq!(found["colours"], json!([white, white, colour, colour, white]), "{name}");
        let texts = found["texts"].as_array().unwrap();
        let kind = if name == "disk.qcow2" { "data" } else { "compressed" };
        for wanted in [name, "qcow2, 1 disk, 8 MiB", &format!("1 MiB {kind} (12 %)"), "7 MiB hole (88 %)"] {
            assert!(texts.contains(&json!(wanted)), "{wanted}: {texts:?}");
        }
        assert_eq!(found["titles"][0], "0 B to 512 KiB: 512 KiB hole (100 %)", "{found}");
    }
}

#[test]
fn dark_screens_get_dark_pages() {
    require!("chromium");
    let directory = workshop();
    let svg = drawing(directory.path(), "disk.qcow2");
    let found = browse(&svg, &[(1, 1), square(2 << 20)], &["--blink-settings=preferredColorScheme=0"]);
    assert_eq!(found["colours"], json!([[13, 17, 23], [74, 168, 240]]));
}

#[test]
fn names_of_untrusted_images_stay_text() {
    require!("chromium");
    let names = [
        "</text><script>document.title=1</script>",
        "\"><image href=\"http://localhost/x\" onload='alert(1)'/>",
        "a&b &lt; \u{1}\u{202e}]]>\u{ffff}",
        "<![CDATA[",
    ];
    let archive =
        Archive::of(names.map(|name| (name, Image::hole("x", 1 << 20).with(0, images::noise(1, 65536)))));
    let directory = tempdir();
    let name = "<svg onload=alert(1)>&.vma";
    std::fs::write(directory.path().join(name), archive.build().bytes).unwrap();
    let svg = imgtool(["map", "--output", "svg", name]).within(directory.path()).ok().text();
    let found = browse(&svg, &[], &[]);
    assert_eq!(found["errors"], 0, "{found}");
    let known = ["circle", "defs", "desc", "g", "path", "pattern", "rect", "style", "svg", "text", "title"];
    assert!(
        found["names"].as_array().unwrap().iter().all(|name| known.contains(&name.as_str().unwrap())),
        "{found}"
    );
    let texts = found["texts"].as_array().unwrap();
    for wanted in [names[0], names[1], "a&b &lt; \\u{1}\\u{202e}]]>\u{fffd}", names[3], name] {
        assert!(texts.contains(&json!(wanted)), "{wanted}: {texts:?}");
    }
}

#[test]
fn huge_fragmented_disks_and_full_archives_stay_small() {
    require!("chromium");
    let directory = tempdir();
    let mut image = Image::hole("x", 2 << 40);
    for piece in 0..2000u64 {
        image = image.with(piece * (1 << 30) + (piece % 7) * 65536, images::noise(piece, 4096));
    }
    image.write_raw(&directory.path().join("huge.raw"));
    let svg = drawing(directory.path(), "huge.raw");
    assert!(svg.len() < 1 << 20, "{} bytes", svg.len());
    let found = browse(&svg, &[], &[]);
    assert_sound(&found);
    assert!(found["elements"].as_u64().unwrap() < 2 * 4096 + 200, "{}", found["elements"]);
    let names: Vec<String> = (0..254).map(|index| format!("drive-scsi{index}")).collect();
    let archive = Archive::of(
        names.iter().map(|name| (name.as_str(), Image::hole("x", 1 << 20).with(65536, vec![1; 4096]))),
    );
    std::fs::write(directory.path().join("many.vma"), archive.build().bytes).unwrap();
    let svg = drawing(directory.path(), "many.vma");
    let found = browse(&svg, &[], &[]);
    assert_sound(&found);
    assert!(found["elements"].as_u64().unwrap() < 254 * 2 * 140, "{}", found["elements"]);
    let one = drawing(directory.path(), "--disk drive-scsi7 many.vma");
    assert!(one.contains("drive-scsi7<") && !one.contains("drive-scsi8<"), "{one}");
}
