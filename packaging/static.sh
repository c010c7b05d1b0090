#!/usr/bin/env bash
# Makes a program that needs no library of the system, target/TRIPLE/release/imgtool, and runs it in a
# directory that holds nothing but the program and an archive. Needs root, or user namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."

triple="$(uname -m)-unknown-linux-gnu"
target="${CARGO_TARGET_DIR:-target}"

# With --target the flags are not those of build scripts and macros, which can't be static.
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
# With a time zone that can't be looked up: there is no /usr/share/zoneinfo.
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
