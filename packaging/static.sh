#!/usr/bin/env bash
# Builds a statically linked program, target/TRIPLE/release/imgtool, and runs it in a directory that holds only
# the program and an archive. Needs root, or user namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."

triple="$(uname -m)-unknown-linux-gnu"
target="${CARGO_TARGET_DIR:-target}"

# --target keeps these flags away from build scripts and proc macros, which cannot be static.
RUSTFLAGS='-C target-feature=+crt-static' cargo build --locked --release --bin imgtool --target "$triple"
program="$target/$triple/release/imgtool"

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
cp "$program" fixtures/two-disks.vma.zst "$root/"

if [ "$(id -u)" -eq 0 ]; then
  enter=(chroot "$root")
else
  enter=(unshare --map-root-user chroot "$root")
fi
# A time zone that cannot be resolved: the directory has no /usr/share/zoneinfo.
inside() { TZ=Europe/Berlin "${enter[@]}" /imgtool "$@"; }
fails() { printf 'static.sh: %s\n' "$1" >&2; exit 1; }

inside info /two-disks.vma.zst | grep -q drive-efidisk0 || fails 'info'
inside check --quiet /two-disks.vma.zst || fails 'check'
inside vma list /two-disks.vma.zst | grep -q 'CTIME: ' || fails 'vma list: no local time'
for format in qcow2 vhdx raw; do
  inside convert --quiet --verify /two-disks.vma.zst --to "$format" "/$format/" || fails "convert to $format"
done
for disk in drive-scsi0 drive-efidisk0; do
  wanted=$(sha256sum <"$root/raw/$disk.raw")
  grep -q "${wanted%% *}" fixtures/manifest.json || fails "$disk: not the content of the manifest"
  for format in qcow2 vhdx; do
    inside compare --quiet "/$format/$disk.$format" "/raw/$disk.raw" || fails "$disk as $format"
  done
done
printf '%s: %s bytes, runs in an empty directory\n' "$program" "$(stat -c %s "$program")"
