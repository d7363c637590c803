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
Style = Literal["bold", "dim", "green"]
_CODES: dict[Style, str] = {"bold": "1", "dim": "2", "green": "32"}
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?%?|-?|nan", re.IGNORECASE)


class ProgressLine:
    """A line about the latest step: rewritten in place on a terminal, in a log a line a step.

    Args:
        num_steps: Steps of the whole run, for `step i/n` and the time left; 0 for a task without
            steps.
        stream: Where the line is written; by default the standard output.
        every: In a log, print only steps that this divides, and the last.
        clock: Returns seconds, monotonic.
        patience_in_place: On a terminal, seconds that something within a step must have lasted
            before `interim` shows it.
        patience_in_log: The same in a log, where it is also the time between two such lines.
    """

    def __init__(
        self,
        num_steps: int = 0,
        stream: TextIO | None = None,
        *,
        every: int = 1,
        clock: Callable[[], float] = time.monotonic,
        patience_in_place: float = 2.0,
        patience_in_log: float = 30.0,
    ) -> None:
        self._num_steps = num_steps
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._every = every
        self._clock = clock
        self._patience_in_place = patience_in_place
        self._patience_in_log = patience_in_log
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._last_interim = -math.inf  # time of the last interim line in a log
        self._line = ""  # about the latest step
        self._drawn = ""  # what stands on the terminal: that line, or an interim one

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step, counted from 1, with the metrics that the line has a place for."""
        line = self._format(step, values)
        if self._in_place:
            self._line = line
            self._draw(line)
        elif step % self._every == 0 or step == self._num_steps:
            self._write(line + "\n")

    def interim(self, fields: Sequence[str], seconds: float) -> None:
        """Show how far something within a step is, until the next message or update.

        Args:
            fields: Parts of the line.
            seconds: How long it has taken so far; what is over soon is never shown.
        """
        line = _GAP.join(fields)
        if self._in_place:
            if seconds >= self._patience_in_place:
                self._draw(line)
        # In a log: it has lasted long enough, and so has the time since the last such line.
        elif min(seconds, self._clock() - self._last_interim) >= self._patience_in_log:
            self._last_interim = self._clock()
            self._write(line + "\n")

    def message(self, text: str) -> None:
        """Print whole lines above the progress line."""
        if not self._in_place:
            return self._write(text + "\n")
        self._write(_CLEAR + text + "\n")
        self._draw(self._line)

    def close(self) -> None:
        """Leave the last line standing."""
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
        """Seconds to the last step at the mean pace since the first `update`, None while there is
        no pace. The first step, which compiles, and steps before a resume do not count."""
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
    """Return whether the stream is a terminal whose user has not said no: see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def styled(text: str, *styles: Style) -> str:
    """Return the text with the escape codes of these styles, on each line anew, as pagers forget
    them at a line's end.

    In: "a\nb", "bold".  Out: ESC[1m a ESC[0m, a line end, ESC[1m b ESC[0m.
    """
    codes = ";".join(_CODES[style] for style in styles)
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned columns under their headers; numbers stand right, all other columns left.

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
