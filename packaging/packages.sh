#!/usr/bin/env bash
# Makes all packages from one build of the static program, in target/packages/:
#
#   imgtool-VERSION-ARCH-linux.tar.gz   program, manual pages, completions
#   imgtool_VERSION_ARCH.deb            the same for Debian and Ubuntu
#   imgtool_vm-VERSION-….whl            the program for pip
#   container/                          the files of the container image, see Containerfile
#   SHA256SUMS
#
# The same source and tools give the same packages. packaging/try.sh tries them.
set -euo pipefail
cd "$(dirname "$0")/.."

# The time of the last commit, for reproducible files.
SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}"
export SOURCE_DATE_EPOCH

field() { sed -n "s/^$1 = \"\(.*\)\"\$/\1/p" Cargo.toml | head -n 1; }
version=$(field version)
maintainer='The imgtool developers <imgtool@users.noreply.github.com>'
program=$(packaging/static.sh)
made="${CARGO_TARGET_DIR:-target}/packages"
rm -rf "$made"
mkdir -p "$made"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022

tarball() {
  local name="imgtool-$version-$(uname -m)-linux"
  local tree="$work/$name"
  mkdir -p "$tree/completions"
  install -m 755 "$program" "$tree/imgtool"
  "$program" man "$tree/man"
  "$program" completions bash >"$tree/completions/imgtool.bash"
  "$program" completions zsh >"$tree/completions/_imgtool"
  "$program" completions fish >"$tree/completions/imgtool.fish"
  cp README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE "$tree"
  tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -c "$name" |
    gzip -9 --no-name >"$made/$name.tar.gz"
}

# There is no /usr/bin/vma in it, since Proxmox VE brings its own. mame-tools has a /usr/bin/imgtool of its own.
debian() {
  local from="$work/imgtool-$version-$(uname -m)-linux" tree="$work/deb" doc="$work/deb/usr/share/doc/imgtool"
  local arch
  arch=$(dpkg --print-architecture)
  mkdir -p "$tree/DEBIAN" "$tree"/usr/share/man/man1 "$doc"
  install -D -m 755 "$program" "$tree/usr/bin/imgtool"
  cp "$from"/man/*.1 "$tree/usr/share/man/man1"
  gzip -9 --no-name "$tree"/usr/share/man/man1/*
  install -D -m 644 "$from/completions/imgtool.bash" "$tree/usr/share/bash-completion/completions/imgtool"
  install -D -m 644 "$from/completions/_imgtool" "$tree/usr/share/zsh/vendor-completions/_imgtool"
  install -D -m 644 "$from/completions/imgtool.fish" "$tree/usr/share/fish/vendor_completions.d/imgtool.fish"
  cp README.md LICENSE-MIT LICENSE-APACHE "$doc"
  gzip -9 --no-name --stdout CHANGELOG.md >"$doc/changelog.gz"
  printf 'Copyright: 2026, The imgtool developers\nLicense: MIT or Apache-2.0, see LICENSE-MIT and LICENSE-APACHE\n' \
    >"$doc/copyright"
  cat >"$tree/DEBIAN/control" <<END
Package: imgtool
Version: $version-1
Architecture: $arch
Maintainer: $maintainer
Section: utils
Priority: optional
Installed-Size: $(du -sk --apparent-size "$tree" | cut -f 1)
Conflicts: mame-tools
Homepage: $(field repository)
Description: Converts disk images and backups of virtual machines
 Converts between raw, qcow2, VHDX, VHD, VDI, VMDK, LUKS and Proxmox VMA in one
 pass, in parallel, sparse, without scratch space, and safely on untrusted
 images. Reads archives through zstd, gzip, lzop, xz and bzip2, from files and
 pipes.
 .
 There is no /usr/bin/vma in this package: Proxmox VE brings its own. "imgtool
 vma" takes the flags of that program.
END
  dpkg-deb --root-owner-group -Zxz --build "$tree" "$made/imgtool_${version}_$arch.deb" >/dev/null
}

container() {
  mkdir "$made/container"
  cp "$program" packaging/Containerfile "$made/container"
}

tarball
debian
packaging/wheel.py "$program" "$version" "$made"
container
(cd "$made" && sha256sum -- *.tar.gz *.deb *.whl >SHA256SUMS)
ls -l "$made"
