#!/usr/bin/env bash
# Tries each package of packaging/packages.sh in an environment that has nothing else. Needs root, or user namespaces;
# for the container image buildah.
set -euo pipefail
cd "$(dirname "$0")/.."

made=$(realpath "${CARGO_TARGET_DIR:-target}/packages")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fails() { printf 'try.sh: %s\n' "$1" >&2; exit 1; }

# Runs a command in a directory as its root.
enter() {
  local root=$1
  shift
  if [ "$(id -u)" -eq 0 ]; then chroot "$root" "$@"; else unshare --map-root-user chroot "$root" "$@"; fi
}

# Asserts that a program works in a directory that has nothing but it and an archive: converts it to several formats.
works_in() {
  local root=$1 program=$2 disk format wanted
  cp fixtures/two-disks.vma.zst "$root/"
  # A time zone that cannot be resolved: the directory has no /usr/share/zoneinfo.
  inside() { TZ=Europe/Berlin enter "$root" "$program" "$@"; }
  inside info /two-disks.vma.zst | grep -q drive-efidisk0 || fails "$program: info"
  inside check --quiet /two-disks.vma.zst || fails "$program: check"
  inside vma list /two-disks.vma.zst | grep -q 'CTIME: ' || fails "$program: vma list: no local time"
  for format in qcow2 vhdx raw; do
    inside convert --quiet --verify /two-disks.vma.zst --to "$format" "/$format/" || fails "$program: to $format"
  done
  for disk in drive-scsi0 drive-efidisk0; do
    wanted=$(sha256sum <"$root/raw/$disk.raw")
    grep -q "${wanted%% *}" fixtures/manifest.json || fails "$program: $disk: not the content of the manifest"
    for format in qcow2 vhdx; do
      inside compare --quiet "/$format/$disk.$format" "/raw/$disk.raw" || fails "$program: $disk as $format"
    done
  done
}

tarball() {
  local root="$work/tar"
  (cd "$made" && sha256sum --quiet --check SHA256SUMS) || fails 'SHA256SUMS'
  mkdir "$root"
  tar -C "$root" --strip-components=1 -xzf "$made"/imgtool-*-linux.tar.gz
  # ldd fails for some kinds of static programs.
  ldd "$root/imgtool" >"$work/ldd" 2>&1 || true
  grep -q -e 'statically linked' -e 'not a dynamic executable' "$work/ldd" || fails "not static: $(cat "$work/ldd")"
  bash -n "$root/completions/imgtool.bash" || fails 'completions for bash'
  grep -q '^\.TH IMGTOOL-CONVERT 1' "$root/man/imgtool-convert.1" || fails 'manual pages'
  works_in "$root" /imgtool
  printf 'tar.gz: checksums, completions, manual pages; static, %s bytes\n' "$(stat -c %s "$root/imgtool")"
}

# A dpkg of its own in an empty directory. The other package of this name must not come beside it.
debian() {
  local root="$work/deb-root" other="$work/mame-tools"
  mkdir -p "$root"/var/lib/dpkg/{info,updates,triggers} "$root/tmp" "$other/DEBIAN" "$other/usr/bin"
  touch "$root/var/lib/dpkg/status" "$root/var/lib/dpkg/available" "$other/usr/bin/imgtool"
  printf 'Package: mame-tools\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n' \
    >"$other/DEBIAN/control"
  dpkg-deb --root-owner-group -Znone --build "$other" "$work/mame-tools.deb" >/dev/null
  install_in() { dpkg --root="$root" --force-not-root --log=/dev/null --install "$1" >"$work/dpkg" 2>&1; }
  install_in "$made"/imgtool_*.deb || fails "dpkg: $(cat "$work/dpkg")"
  works_in "$root" /usr/bin/imgtool
  [ -s "$root/usr/share/man/man1/imgtool-convert.1.gz" ] || fails 'deb: no manual pages'
  if install_in "$work/mame-tools.deb"; then fails 'deb: mame-tools can be installed beside it'; fi
  grep -q 'conflict' "$work/dpkg" || fails "deb: $(cat "$work/dpkg")"
  dpkg --root="$root" --force-not-root --log=/dev/null --purge imgtool >/dev/null 2>&1 || fails 'deb: purge'
  [ ! -e "$root/usr/bin/imgtool" ] || fails 'deb: purge leaves the program'
  printf 'deb: installs, conflicts with mame-tools, leaves nothing\n'
}

wheel() {
  local venv="$work/venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-index "$made"/*.whl || fails 'pip install'
  mkdir "$work/wheel"
  cp "$venv/bin/imgtool" "$work/wheel/"
  works_in "$work/wheel" /imgtool
  env -i PATH="$venv/bin" "$venv/bin/imgtool" --version >/dev/null || fails 'wheel: --version'
  printf 'wheel: pip installs it without an index, the program works\n'
}

container() {
  if ! command -v buildah >/dev/null; then
    [ -z "${CI:-}" ] || fails 'no buildah'
    printf 'container: SKIPPED, no buildah\n'
    return
  fi
  local store=(--root "$work/store" --runroot "$work/run" --storage-driver vfs)
  local made_from root entry
  buildah "${store[@]}" build --quiet --isolation chroot --tag imgtool "$made/container" >/dev/null || fails 'Containerfile'
  made_from=$(buildah "${store[@]}" from imgtool)
  root=$(buildah "${store[@]}" mount "$made_from")
  entry=$(buildah "${store[@]}" inspect --format '{{index .OCIv1.Config.Entrypoint 0}}' "$made_from")
  [ "$(find "$root" -type f)" = "$root$entry" ] || fails "container: $(find "$root" -type f)"
  works_in "$root" "$entry"
  buildah "${store[@]}" rm "$made_from" >/dev/null
  printf 'container: one file, its entry point works\n'
}

tarball
debian
wheel
container
