"""Warnings of verifiers that do not judge."""

from srft_jax.experience.verdicts import Scored, ShapingTerm

from srft_jax.data.examples import Example
from srft_jax.report.verdict_watch import VerdictWatch


def scored(verdicts, kind="math", shaping=()):
    example = Example("How many?", "7", kind=kind)
    return [
        Scored(example, f"text {n}", 0.0, verdict, shaping) for n, verdict in enumerate(verdicts)
    ]


def test_more_than_a_fifth_is_warned_of_once_with_an_example():
    watch = VerdictWatch()
    assert not list(watch.warnings(1, scored(["timeout"] + ["right"] * 4)))
    assert not list(watch.warnings(2, scored(["wrong"] * 5)))
    (warning,) = watch.warnings(3, scored(["right"] * 3 + ["timeout"] * 2))
    for part in ("step 3", "the verdict of math is timeout for 40%", "How many?", "text 3"):
        assert part in warning
    assert not list(watch.warnings(4, scored(["timeout"] * 5)))
    (warning,) = watch.warnings(5, scored(["timeout"] * 3 + ["unparsed"] * 2))
    assert "unparsed for 40%" in warning and "Do the chat template" in warning


def test_kinds_are_told_apart():
    """A fifth of all, but all of one kind; terms of the reward count as kinds too."""
    watch = VerdictWatch()
    mixed = scored(["right"] * 9) + scored(["crash"], kind="mine:f")
    (warning,) = watch.warnings(1, mixed)
    assert "mine:f is crash for 100%" in warning
    term = ShapingTerm("other:g", 1.0, 0.0, "crash")
    (warning,) = watch.warnings(2, scored(["right"] * 3, shaping=(term,)))
    assert "other:g is crash for 100%" in warning
    assert not list(watch.warnings(3, []))
