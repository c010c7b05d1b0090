#!/usr/bin/env bash
# Builds a Debian package, target/deb/imgtool_VERSION_ARCH.deb: the program, a manual page for each command,
# completions for bash, zsh and fish, licences. Needs cargo-deb: cargo install cargo-deb
#
# The package does not install /usr/bin/vma, since Proxmox VE ships its own. To get that name elsewhere:
# ln -s imgtool /usr/local/bin/vma
set -euo pipefail
cd "$(dirname "$0")/.."

# The same source gives the same package.
SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}"
export SOURCE_DATE_EPOCH

target="${CARGO_TARGET_DIR:-target}"
made="$target/deb"

cargo build --locked --release --bin imgtool
program="$target/release/imgtool"

rm -rf "$made"
mkdir -p "$made/man"
"$program" man "$made/man"
# Without name and time, for reproducible files.
gzip -9 --no-name "$made"/man/*.1
"$program" completions bash >"$made/imgtool.bash"
"$program" completions zsh >"$made/_imgtool"
"$program" completions fish >"$made/imgtool.fish"

gzip -9 --no-name --stdout CHANGELOG.md >"$made/changelog.gz"

# Debian's own changelog of the package.
field() { sed -n "s/^$1 = \"\(.*\)\"\$/\1/p" Cargo.toml | head -n 1; }
cat >"$made/changelog.Debian" <<END
imgtool ($(field version)-1) unstable; urgency=medium

  * Built from the sources; see changelog.gz for their changes.

 -- $(field maintainer)  $(date --utc --rfc-email --date "@$SOURCE_DATE_EPOCH")
END

cargo deb --locked --no-build --no-strip --output "$made/"
