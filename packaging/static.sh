#!/usr/bin/env bash
# Builds the statically linked program of all packages, target/TRIPLE/dist/imgtool, and prints its path.
#
# The C library is glibc: it chooses the fastest copying routines for the processor, which musl does not have.
set -euo pipefail
cd "$(dirname "$0")/.."

triple="$(uname -m)-unknown-linux-gnu"
# --target keeps these flags away from build scripts and proc macros, which cannot be static.
RUSTFLAGS='-C target-feature=+crt-static' cargo build --locked --profile dist --bin imgtool --target "$triple" >&2
printf '%s\n' "${CARGO_TARGET_DIR:-target}/$triple/dist/imgtool"
