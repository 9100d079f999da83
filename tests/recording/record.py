#!/usr/bin/env python3
"""Records a command on a terminal, and draws the recording as an SVG that moves.

    pip install pyte
    tests/recording/record.py record docs/demo.cast -- target/release/sluice demo
    tests/recording/record.py draw docs/demo.cast docs/demo.svg
    tests/recording/record.py draw docs/demo.cast /tmp/last.svg --frame -1

The recording is an asciicast, version 2 (https://docs.asciinema.org/manual/asciicast/v2/): `asciinema play` shows it as well. The SVG
needs nothing from elsewhere. Its frames lie side by side and a style sheet moves them past; a line that several frames share is there
once. With --frame, it is one frame that does not move, for printing and for looking at.
"""

import argparse
import codecs
import fcntl
import html
import json
import os
import pathlib
import pty
import re
import struct
import sys
import termios
import time

ROWS, COLUMNS = 24, 80
# Pixels of a character, and around all of them.
WIDTH, HEIGHT, MARGIN = 8, 17, 12
# Seconds for which the last frame stays, and the least that any stays.
HOLD, LEAST = 6.0, 0.25
COLOURS = {
    "default": "#d8dee9",
    "black": "#4c566a",
    "red": "#e06c75",
    "green": "#98c379",
    "brown": "#e5c07b",
    "blue": "#61afef",
    "magenta": "#c678dd",
    "cyan": "#56b6c2",
    "white": "#ffffff",
}


def record(target, command, prompt):
    """Runs the command on a terminal of its own and writes what comes, with the times."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", LANG="C.UTF-8")
        os.environ.pop("NO_COLOR", None)
        # The size is there before the program asks for it.
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.execvp(command[0], command)
    start, events = time.monotonic(), []
    decoder = codecs.getincrementaldecoder("utf-8")()
    shown = f"$ {prompt}\r\n"
    events.append([0.0, "o", shown])
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            break
        if not data:
            break
        events.append([round(0.5 + time.monotonic() - start, 3), "o", decoder.decode(data)])
    status = os.waitpid(pid, 0)[1]
    if status:
        sys.exit(f"{command[0]} has failed: {os.waitstatus_to_exitcode(status)}")
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": prompt, "env": {"TERM": "xterm-256color"}}
    lines = [header, *events]
    pathlib.Path(target).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def frames(cast):
    """What the screen shows, and for how long: pairs of seconds and lines, which are lists of runs (text, style)."""
    import pyte  # only drawing needs it

    header, *events = [json.loads(line) for line in pathlib.Path(cast).read_text().splitlines()]
    screen = pyte.Screen(header["width"], header["height"])
    stream = pyte.Stream(screen)
    shown, last = [], 0.0
    for at, kind, data in events:
        if kind != "o":
            continue
        if at - last >= LEAST and events[0][0] < at:
            shown.append((at - last, picture(screen)))
            last = at
        stream.feed(data)
    shown.append((HOLD, picture(screen)))
    joined = []
    for seconds, lines in shown:
        if joined and joined[-1][1] == lines:
            joined[-1] = (joined[-1][0] + seconds, lines)
        else:
            joined.append((seconds, lines))
    return joined


def picture(screen):
    """The lines of a screen as runs of characters of one style."""
    lines = []
    for row in range(screen.lines):
        runs = []
        for column in range(screen.columns):
            char = screen.buffer[row][column]
            style = (char.fg if char.fg in COLOURS else "default", char.bold)
            if runs and runs[-1][1] == style:
                runs[-1][0] += char.data
            else:
                runs.append([char.data, style])
        while runs and not runs[-1][0].strip():
            runs.pop()
        lines.append(tuple((text, style) for text, style in runs))
    return tuple(lines)


def text_of(line):
    """A line as an SVG text. A run begins at the column where it is, whatever font the reader has."""
    parts, column = [], 0
    for text, (colour, bold) in line:
        classes = " ".join(name for name in (colour if colour != "default" else "", "B" if bold else "") if name)
        attributes = f' class="{classes}"' if classes else ""
        # Fonts are wider or narrower than their columns: every word group begins at its column, and has the length of its columns.
        for group in re.finditer(r"\S+(?: \S+)*", text):
            x, length = (column + group.start()) * WIDTH, len(group.group()) * WIDTH
            parts.append(f'<tspan x="{x}" textLength="{length}"{attributes}>{html.escape(group.group())}</tspan>')
        column += len(text)
    return "".join(parts)


def draw(cast, target, frame):
    """Draws a recording."""
    shown = frames(cast)
    if frame is not None:
        shown = [shown[frame]]
    width, height = COLUMNS * WIDTH + 2 * MARGIN, ROWS * HEIGHT + 2 * MARGIN
    symbols, strip = {}, []
    for number, (_, lines) in enumerate(shown):
        uses = []
        for row, line in enumerate(lines):
            if not line:
                continue
            name = symbols.setdefault(line, f"l{len(symbols)}")
            uses.append(f'<use href="#{name}" y="{row * HEIGHT}"/>')
        strip.append(f'<g transform="translate({number * width})">{"".join(uses)}</g>')
    used = [f'<text id="{name}" y="13">{text_of(line)}</text>' for line, name in symbols.items()]
    total, at, steps = sum(seconds for seconds, _ in shown), 0.0, []
    for number, (seconds, _) in enumerate(shown):
        steps.append(f"{100 * at / total:.2f}%{{transform:translateX({-number * width}px)}}")
        at += seconds
    colours = "".join(f".{name}{{fill:{value}}}" for name, value in COLOURS.items())
    moves = (
        f"#s{{animation:a {total:.2f}s step-end infinite}}@keyframes a{{{''.join(steps)}}}" if len(shown) > 1 else ""
    )
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<title>A recording of sluice in a terminal</title>
<style>text{{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:{COLOURS["default"]};white-space:pre}}
.B{{font-weight:bold}}{colours}{moves}</style>
<rect width="{width}" height="{height}" rx="8" fill="#1e222a"/>
<defs>{"".join(used)}</defs>
<svg x="{MARGIN}" y="{MARGIN}" width="{width - 2 * MARGIN}" height="{height - 2 * MARGIN}">
<g id="s">{"".join(strip)}</g>
</svg>
</svg>
"""
    pathlib.Path(target).write_text(svg)
    print(f"{target}: {len(shown)} frames, {len(symbols)} lines, {len(svg) / 1000:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    recording = commands.add_parser("record", help="run a command and record it")
    recording.add_argument("cast")
    recording.add_argument("--prompt", default="sluice demo", help="what is shown as the command that was typed")
    recording.add_argument("command", nargs="+")
    drawing = commands.add_parser("draw", help="draw a recording as SVG")
    drawing.add_argument("cast")
    drawing.add_argument("svg")
    drawing.add_argument("--frame", type=int, help="only this frame; -1 is the last")
    args = parser.parse_args()
    if args.what == "record":
        record(args.cast, args.command, args.prompt)
    else:
        draw(args.cast, args.svg, args.frame)


if __name__ == "__main__":
    main()
