import io

import pytest

from srft_jax.report.terminal import ProgressLine, shows_colours, styled, table

VALUES = {
    "rollout/reward": 0.5,
    "rollout/accuracy": 0.25,
    "policy/entropy_self": 1.25,
    "weights/rl": 0.1,
    "perf/tokens_per_second": 12345.6,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """Lines as a terminal shows them: \\r goes to the first column, ESC[K erases from there."""
        lines = self.getvalue().split("\n")
        return [line.split("\r\x1b[K")[-1] for line in lines]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def clock(*times):
    return iter(times).__next__


def test_plain_log_lines():
    stream = io.StringIO()
    with ProgressLine(100, stream, clock=clock(50.0, 60.0)) as progress:
        progress.update(1, VALUES)
        progress.message("saved")
        progress.update(11, {})
    assert stream.getvalue() == (
        "step   1/100  reward 0.500  accuracy 25.0%  entropy self 1.250  weight rl 0.100"
        "  12,346 tokens/s\nsaved\nstep  11/100  ETA 0:01:29\n"
    )


def test_every_thins_the_log_but_keeps_the_last_step():
    stream = io.StringIO()
    progress = ProgressLine(7, stream, every=3)
    for step in range(1, 8):
        progress.update(step, {})
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == [
        "step 3",
        "step 6",
        "step 7",
    ]


def test_a_terminal_shows_one_line_rewritten_below_messages():
    stream = Terminal()
    progress = ProgressLine(3, stream)
    progress.message("start")
    progress.update(1, VALUES)
    progress.message("short")
    progress.update(2, {})
    assert len(stream.screen()) == 3
    assert stream.screen()[:2] == ["start", "short"]
    assert stream.screen()[2].startswith("step 2/3")
    progress.close()
    progress.close()
    assert stream.getvalue().count("\n") == 3


def test_what_is_soon_over_is_not_shown():
    for stream in (Terminal(), io.StringIO()):
        progress = ProgressLine(3, stream)
        for seconds in (0.1, 1.0, 1.9):
            progress.interim(["rollout", "1/2"], seconds)
        progress.close()
        assert stream.getvalue() == ""


def test_a_terminal_shows_what_is_long_until_there_is_more_to_say():
    stream = Terminal()
    progress = ProgressLine(3, stream)
    progress.update(1, {})
    for seconds in (1.9, 2.0, 2.1):
        progress.interim(["rollout", f"{seconds}"], seconds)
    assert stream.screen() == ["rollout  2.1"] and "1.9" not in stream.getvalue()
    progress.message("saved")
    assert stream.screen() == ["saved", "step 1/3"]


def test_a_log_has_a_line_every_half_minute():
    """Two rollouts of 100 seconds, one after the other."""
    stream, now = io.StringIO(), 0
    progress = ProgressLine(3, stream, clock=lambda: now)
    for what in ("first", "second"):
        for seconds in range(100):
            now += 1
            progress.interim([what, f"{seconds} s"], seconds)
    expected = [f"{what}  {seconds} s" for what in ("first", "second") for seconds in (30, 60, 90)]
    assert stream.getvalue().splitlines() == expected


def test_an_interrupted_first_rollout_leaves_its_line_standing():
    stream = Terminal()
    with ProgressLine(3, stream) as progress:
        progress.interim(["rollout", "1/2"], 2.0)
    assert stream.screen() == ["rollout  1/2", ""]


def test_a_line_never_wraps(monkeypatch):
    """A field that does not fit is left out whole: half a number is another number."""
    monkeypatch.setenv("COLUMNS", "26")
    stream = Terminal()
    ProgressLine(3, stream).update(1, VALUES)
    (line,) = stream.screen()
    assert line.startswith("step 1/3  reward 0.") and "accuracy" not in line
    monkeypatch.setenv("COLUMNS", "20")
    ProgressLine(3, narrow := Terminal()).update(1, VALUES)
    assert narrow.screen() == ["step 1/3"]


def test_table_aligns_numbers_right():
    drawn = table(["set", "pass@1", "note"], [["held_out", "8.2%", "-"], ["ood", 12.5, "longer"]])
    assert drawn.splitlines() == [
        "set       pass@1  note",
        "--------  ------  ------",
        "held_out    8.2%  -",
        "ood         12.5  longer",
    ]


def test_table_rejects_ragged_rows():
    with pytest.raises(ValueError):
        table(["a", "b"], [[1, 2], [3]])


def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shows_colours(Terminal()) and not shows_colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not shows_colours(Terminal())


def test_styles_end_with_their_line():
    assert styled("a\n\nb", "green", "bold") == "\x1b[32;1ma\x1b[0m\n\n\x1b[32;1mb\x1b[0m"
