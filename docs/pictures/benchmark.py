#!/usr/bin/env python3
"""Draws benchmark.svg from the measurements in ../performance-results.json.

    docs/pictures/benchmark.py           writes the picture
    docs/pictures/benchmark.py --check   fails if the picture is not that of the measurements

Shows every conversion measured in memory for which qemu-img takes at least a tenth of a second. The peer is the
faster one of the measured ways to call qemu-img. Standard library only.
"""

import json
import statistics
import sys
from pathlib import Path

from style import SANS, document, escape

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "performance-results.json"
PICTURE = HERE / "benchmark.svg"

WIDTH, LEFT, RIGHT, TOP, ROW = 870, 200, 150, 86, 38
SCALE = WIDTH - LEFT - RIGHT

STYLE = f"""text{{font-family:{SANS};fill:#1f2328;font-size:13px;font-variant-numeric:tabular-nums}}
.page{{fill:#fff}}.h1{{font-size:17px;font-weight:650}}.note{{fill:#59636e;font-size:12px}}
.ratio{{font-weight:650}}.ours{{fill:#0072b2}}.theirs{{fill:#c9d0d8}}
@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.page{{fill:#0d1117}}.note{{fill:#9198a1}}
.ours{{fill:#4aa8f0}}.theirs{{fill:#3d444d}}}}
"""


def median(run):
    """Returns the median of the elapsed times; None if the program was skipped."""
    samples = run["samples"]
    return statistics.median(sample["wall"] for sample in samples) if samples else None


def rows(results):
    """Yields the name of each conversion, our time, and the time of the faster qemu-img."""
    for row in results["rows"]:
        times = {run["program"]: median(run) for run in row["runs"]}
        peers = [time for name, time in times.items() if name.startswith("qemu-img") and time is not None]
        if peers and min(peers) >= 0.1:
            yield row["conversion"], times["imgtool"], min(peers)


def seconds(time):
    return f"{time:.1f} s" if time >= 9.95 else f"{time:.2f} s"


def picture(results):
    """Returns the document."""
    found = list(rows(results))
    machine = results["machine"]
    qemu = machine["qemu-img"].split()[2]
    rounds = results["rounds"]
    body = [
        '<rect class="page" width="100%" height="100%"/>',
        '<text class="h1" x="24" y="36">Time of a conversion</text>',
        f'<text class="note" x="24" y="58">4 GiB with 1.4 GiB of data unless stated, in memory, {machine["cpus"]} cores; '
        f"medians of {rounds} runs; qemu-img {escape(qemu)}, the faster of two ways to call it</text>",
    ]
    for index, (name, ours, theirs) in enumerate(found):
        y = TOP + index * ROW
        wide = [max(ours, theirs), ours, theirs]
        ours_wide, theirs_wide = (time / wide[0] * SCALE for time in wide[1:])
        body += [
            f'<text x="{LEFT - 12}" y="{y + 17}" text-anchor="end">{escape(name)}</text>',
            f'<rect class="ours" x="{LEFT}" y="{y}" width="{ours_wide:.1f}" height="12" rx="2"/>',
            f'<rect class="theirs" x="{LEFT}" y="{y + 14}" width="{theirs_wide:.1f}" height="12" rx="2"/>',
            f'<text class="ratio" x="{WIDTH - RIGHT + 14}" y="{y + 17}">{theirs / ours:.1f} ×</text>',
            f'<text class="note" x="{WIDTH - 24}" y="{y + 11}" text-anchor="end">{seconds(ours)}</text>',
            f'<text class="note" x="{WIDTH - 24}" y="{y + 25}" text-anchor="end">{seconds(theirs)}</text>',
        ]
    end = TOP + len(found) * ROW + 8
    body += [
        f'<rect class="ours" x="{LEFT}" y="{end}" width="12" height="12" rx="2"/>',
        f'<text class="note" x="{LEFT + 18}" y="{end + 11}">imgtool</text>',
        f'<rect class="theirs" x="{LEFT + 90}" y="{end}" width="12" height="12" rx="2"/>',
        f'<text class="note" x="{LEFT + 108}" y="{end + 11}">qemu-img (= full length)</text>',
    ]
    words = "; ".join(f"{name}: {seconds(a)}, qemu-img {seconds(b)}" for name, a, b in found)
    return document(WIDTH, end + 32, "Time of a conversion", words, STYLE, "\n".join(body) + "\n")


def main():
    made = picture(json.loads(RESULTS.read_text())["tmpfs"])
    if "--check" in sys.argv[1:]:
        if PICTURE.read_text() != made:
            sys.exit("docs/pictures/benchmark.svg is not that of docs/performance-results.json: run benchmark.py")
    else:
        PICTURE.write_text(made)


if __name__ == "__main__":
    main()
