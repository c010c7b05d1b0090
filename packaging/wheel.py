#!/usr/bin/env python3
"""Makes a Python wheel that carries the program: pip install imgtool-vm, then call imgtool.

    packaging/wheel.py PROGRAM VERSION DIRECTORY

On PyPI, the name imgtool belongs to a program that signs firmware images. The static program runs with every C library,
so the wheel has the tags of glibc and of musl. Written here rather than with maturin, which would call cargo again: a wheel
is a zip archive with a list of its files. SOURCE_DATE_EPOCH sets the time of the files. Standard library only.
"""

import base64
import hashlib
import os
import platform
import sys
import time
import zipfile
from pathlib import Path

NAME = "imgtool_vm"
README = Path(__file__).resolve().parent / "wheel.md"


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    program, version, directory = sys.argv[1:]
    machine = platform.machine()
    tags = [f"manylinux_2_17_{machine}", f"musllinux_1_1_{machine}"]
    info = f"{NAME}-{version}.dist-info"
    metadata = f"""Metadata-Version: 2.4
Name: imgtool-vm
Version: {version}
Summary: Converts VM disk images and Proxmox backups: raw, qcow2, VHDX, VHD, VDI, VMDK, VMA
License-Expression: MIT OR Apache-2.0
Keywords: qcow2,vhdx,vmdk,vma,proxmox
Project-URL: Repository, https://github.com/imgtool/imgtool
Requires-Python: >=3.8
Description-Content-Type: text/markdown

{README.read_text()}"""
    wheel = "Wheel-Version: 1.0\nGenerator: imgtool\nRoot-Is-Purelib: false\n"
    wheel += "".join(f"Tag: py3-none-{tag}\n" for tag in tags)
    files = {
        f"{NAME}-{version}.data/scripts/imgtool": Path(program).read_bytes(),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": wheel.encode(),
    }
    record = "".join(f"{name},sha256={digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    # Zip archives begin in 1980.
    moment = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH", 0)), 315532800))[:6]
    path = Path(directory) / f"{NAME}-{version}-py3-none-{'.'.join(tags)}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, moment)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if name.endswith("/imgtool") else 0o100644) << 16
            archive.writestr(entry, data)


def digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


if __name__ == "__main__":
    main()
