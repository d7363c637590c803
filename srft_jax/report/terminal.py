"""What a run prints: one line of progress, plain-text tables, and colours on a terminal."""

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self, TextIO

# Label, metric, format; the order on the line. A narrow terminal cuts the tail.
_FIELDS = (
    ("reward ", "rollout/reward", "{:.3f}"),
    ("accuracy ", "rollout/accuracy", "{:.1%}"),
    ("entropy self ", "policy/entropy_self", "{:.3f}"),
    ("entropy demo ", "policy/entropy_demo", "{:.3f}"),
    ("weight sft ", "weights/sft", "{:.3f}"),
    ("weight rl ", "weights/rl", "{:.3f}"),
    ("", "perf/tokens_per_second", "{:,.0f} tokens/s"),
)
_GAP = "  "  # between the fields of the line
_CLEAR = "\r\x1b[K"  # back to the first column, erase to the end of the line
# Seconds that something within a step must last to be shown; in a log, also those between lines.
_PATIENCE_IN_PLACE, _PATIENCE_IN_LOG = 2.0, 30.0
Style = Literal["bold", "dim", "green"]
_CODES: dict[Style, str] = {"bold": "1", "dim": "2", "green": "32"}
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?%?|-?|nan", re.IGNORECASE)


class ProgressLine:
    """A line about the latest step: rewritten in place on a terminal, elsewhere one line each.

    Args:
        num_steps: Steps of the whole run, for `step i/n` and the time left; 0 for what has none.
        stream: Where to; by default the standard output.
        every: Off a terminal, print only steps that this divides, and the last.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        num_steps: int = 0,
        stream: TextIO | None = None,
        *,
        every: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._every = every
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._last_interim = -math.inf  # time of the last line in a log
        self._line = ""
        self._drawn = ""

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `step`, counted from 1, with those of its metrics that the line has a place for."""
        line = self._format(step, values)
        if self._in_place:
            self._line = line
            self._draw(line)
        elif step % self._every == 0 or step == self._num_steps:
            self._write(line + "\n")

    def interim(self, fields: Sequence[str], seconds: float) -> None:
        """Shows how far something long is, until the next message or update.

        Args:
            fields: Of the line.
            seconds: How long it has taken so far; what is over soon is never shown.
        """
        line = _GAP.join(fields)
        if self._in_place:
            if seconds >= _PATIENCE_IN_PLACE:
                self._draw(line)
        elif min(seconds, self._clock() - self._last_interim) >= _PATIENCE_IN_LOG:
            self._last_interim = self._clock()
            self._write(line + "\n")

    def message(self, text: str) -> None:
        """Prints whole lines above the progress line."""
        if not self._in_place:
            return self._write(text + "\n")
        self._write(_CLEAR + text + "\n")
        self._draw(self._line)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._drawn:
            self._write("\n")
            self._line = self._drawn = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _format(self, step: int, values: Mapping[str, float]) -> str:
        parts = [f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}"]
        parts += [
            label + form.format(values[name]) for label, name, form in _FIELDS if name in values
        ]
        left = self._seconds_left(step)
        if left is not None:
            minutes, seconds = divmod(round(left), 60)
            parts.insert(1, f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
        return _GAP.join(parts)

    def _seconds_left(self, step: int) -> float | None:
        """At the mean pace since the first update: compilation and resumed steps do not count."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, start = self._first
        if not first_step < step < self._num_steps:
            return None
        return (now - start) / (step - first_step) * (self._num_steps - step)

    def _draw(self, line: str) -> None:
        self._drawn = line
        # A line as wide as the terminal would wrap, and \r would no longer reach its beginning.
        width = shutil.get_terminal_size().columns - 1
        shown, *fields = line.split(_GAP)
        for field in fields:  # whole ones only: a number cut in two is another number
            if len(shown) + len(_GAP) + len(field) > width:
                break
            shown += _GAP + field
        self._write(_CLEAR + shown[:width])

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def shows_colours(stream: TextIO) -> bool:
    """A terminal whose user has not said no: see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def styled(text: str, *styles: Style) -> str:
    """With the escape codes of these styles; line by line, as pagers forget them at a line's end.

    In: "a\nb", "bold".  Out: ESC[1m a ESC[0m, a line end, ESC[1m b ESC[0m.
    """
    codes = ";".join(_CODES[style] for style in styles)
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns under their headers; a column of numbers stands right, any other left.

    In: ["set", "pass@1"], [["held_out", "8.2%"], ["ood", "12.0%"]].  Out:

        set       pass@1
        --------  ------
        held_out    8.2%
        ood        12.0%
    """
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    rule = ["-" * width for width in widths]
    return "\n".join(line(row) for row in [list(headers), rule, *cells])
