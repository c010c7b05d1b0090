#!/usr/bin/env python3
"""Records commands in a terminal and draws them as terminal.svg, an animation at the speed of the recording.

    docs/pictures/terminal.py DIRECTORY COMMAND...

Runs each COMMAND with bash in DIRECTORY, on a pseudo terminal, with imgtool in PATH. The pictures show the screen
after each change; typing is added. Readers who prefer reduced motion see the last screen. Standard library only.
"""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

from style import MONO, document, escape

PICTURE = Path(__file__).resolve().parent / "terminal.svg"
COLUMNS, LINES = 80, 24
CHAR, LINE, MARGIN, BAR = 8.4, 18, 20, 34

# Seconds: between two typed characters, before a command runs, at the end. The last screen also comes first, for
# renderers that show the beginning of an animation only.
TYPING, PAUSE, END, START = 0.035, 0.35, 3.0, 2.0

# Minimum distance of two pictures in seconds.
FRAME = 0.06

STYLE = f"""text{{font-family:{MONO};font-size:14px;fill:#e6edf3;white-space:pre}}
.page{{fill:#0d1117}}.edge{{fill:none;stroke:#3d444d}}.dot{{fill:#3d444d}}
.b{{font-weight:700}}.c31{{fill:#ff7b72}}.c32{{fill:#56d364}}.c33{{fill:#e3b341}}.c34{{fill:#79c0ff}}.c35{{fill:#d2a8ff}}
.c36{{fill:#4aa8f0}}.dim{{fill:#9198a1}}.f{{visibility:hidden}}.last{{visibility:visible}}
"""


class Screen:
    """A terminal: the text and colours of its lines, and the cursor. Knows the sequences that imgtool writes."""

    SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[()][0-9A-B]|\x1b[=>]")

    def __init__(self):
        self.lines, self.row, self.column, self.style = [[]], 0, 0, ()

    def feed(self, text):
        position = 0
        while position < len(text):
            match = self.SEQUENCE.match(text, position)
            if match:
                self.obey(match.group(2), match.group(1) or "")
                position = match.end()
                continue
            self.put(text[position])
            position += 1

    def put(self, char):
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self.row += 1
            while self.row >= len(self.lines):
                self.lines.append([])
        elif char >= " ":
            # The cursor stays behind a full line until the next character.
            if self.column == COLUMNS:
                self.put("\r")
                self.put("\n")
            line = self.lines[self.row]
            line.extend([(" ", ())] * (self.column + 1 - len(line)))
            line[self.column] = (char, self.style)
            self.column += 1

    def obey(self, name, text):
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        count = max(numbers[0] if numbers else 1, 1)
        line = self.lines[self.row]
        if name == "m":
            self.paint(numbers or [0])
        elif name == "A":
            self.row = max(self.row - count, 0)
        elif name == "B":
            self.row = min(self.row + count, len(self.lines) - 1)
        elif name == "C":
            self.column += count
        elif name == "D":
            self.column = max(self.column - count, 0)
        elif name == "G":
            self.column = count - 1
        elif name == "K":
            start = 0 if numbers == [2] else self.column
            del line[start:]
        elif name == "J":
            del line[self.column :]
            del self.lines[self.row + 1 :]
        elif name not in "hl":
            sys.exit(f"terminal.py: unknown sequence {text}{name}")

    def paint(self, numbers):
        for number in numbers:
            if number == 0:
                self.style = ()
            elif number == 1:
                self.style += ("b",)
            elif 30 < number < 37:
                self.style = tuple(s for s in self.style if s == "b") + (f"c{number}",)
            elif number == 39:
                self.style = tuple(s for s in self.style if s == "b")

    def shown(self):
        """Returns the lines on the screen, each as runs of text of one style."""
        runs = []
        for line in self.lines[-LINES:]:
            row = []
            for char, style in line:
                if row and row[-1][1] == style:
                    row[-1] = (row[-1][0] + char, style)
                else:
                    row.append((char, style))
            runs.append(tuple(row))
        while runs and not runs[-1]:
            runs.pop()
        return tuple(runs)


def play(command, directory):
    """Runs a command on a pseudo terminal and yields its output with the seconds since its start."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(directory)
        environment = dict(os.environ, TERM="xterm-256color", LC_ALL="C.UTF-8")
        os.execvpe("bash", ["bash", "-c", "stty cols 80 rows 24; exec " + command], environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    start, pending = time.monotonic(), b""
    while True:
        select.select([terminal], [], [])
        try:
            pending += os.read(terminal, 65536)
        except OSError:
            break
        text = pending.decode(errors="ignore")
        pending = pending[len(text.encode()) :]
        yield time.monotonic() - start, text
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"terminal.py: {command}: status {status}")


def record(commands, directory):
    """Returns the screens of a session with their times, and the time of the end."""
    screen, now, frames = Screen(), 0.0, []

    def keep():
        if frames and now - frames[-1][0] < FRAME:
            frames.pop()
        if not frames or frames[-1][1] != screen.shown():
            frames.append((now, screen.shown()))

    for command in commands:
        screen.style = ("c32",)
        screen.feed("$ ")
        screen.style = ()
        keep()
        for char in command:
            screen.feed(char)
            now += TYPING
            keep()
        now += PAUSE
        screen.feed("\r\n")
        start = now
        for elapsed, text in play(command, directory):
            now = start + elapsed
            screen.feed(text)
            keep()
        now += 2 * PAUSE
        frames.append((now, screen.shown()))
        now += FRAME
    frames = [(0.0, frames[-1][1])] + [(START + time, screen) for time, screen in frames]
    return frames, START + now + END


def draw_line(runs, row):
    column, text = 0, ""
    for part, style in runs:
        if part.strip():
            classes = f' class="{" ".join(style)}"' if style else ""
            text += f'<tspan x="{MARGIN + column * CHAR:.1f}"{classes}>{escape(part)}</tspan>'
        column += len(part)
    return f'<text y="{BAR + MARGIN + row * LINE}">{text}</text>' if text else ""


def draw(frames, end):
    """Returns the document: each line of text is shown during the pictures that have it."""
    spans = {}
    for index, (start, screen) in enumerate(frames):
        until = frames[index + 1][0] if index + 1 < len(frames) else end
        for row, runs in enumerate(screen):
            known = spans.setdefault((row, runs), [])
            if known and known[-1][1] == start:
                known[-1][1] = until
            else:
                known.append([start, until])
    style, body = STYLE, ""
    # A renderer without animations shows the last screen.
    motion = "@media(prefers-reduced-motion:no-preference){\n"
    for index, ((row, runs), times) in enumerate(spans.items()):
        line = draw_line(runs, row)
        if not line:
            continue
        steps = "".join(
            f"{start / end * 100:.3f}%{{visibility:visible}}" + (f"{until / end * 100:.3f}%{{visibility:hidden}}" if until < end else "")
            for start, until in times
        )
        hidden = "0%{visibility:hidden}" if times[0][0] else ""
        motion += f"@keyframes k{index}{{{hidden}{steps}}}#l{index}{{animation:k{index} {end:.2f}s step-end infinite}}\n"
        last = " last" if times[-1][1] == end else ""
        body += f'<g id="l{index}" class="f{last}">{line}</g>\n'
    height = BAR + MARGIN + max(len(screen) for _, screen in frames) * LINE
    width = round(COLUMNS * CHAR + 2 * MARGIN)
    dots = "".join(f'<circle class="dot" cx="{MARGIN + 5 + 20 * dot}" cy="20" r="6"/>' for dot in range(3))
    frame = f'<rect class="page" width="{width}" height="{height}" rx="10"/>\n{dots}\n'
    words = "\n".join("".join(text for text, _ in runs) for runs in frames[-1][1])
    return document(width, height, "imgtool in a terminal", words, style + motion + "}\n", frame + body)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    PICTURE.write_text(draw(*record(sys.argv[2:], sys.argv[1])))


if __name__ == "__main__":
    main()
