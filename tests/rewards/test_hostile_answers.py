"""Forty hostile answers for every kind: a verdict in time, no code run, and the next one right."""

import pathlib
import time

import pytest
from hostile_answers import hostile_answers

from srft_jax.rewards import RewardPool, RewardRequest
from srft_jax.rewards.verifiers import KINDS

DEADLINE = 0.3
# A pattern that is slow wherever the hostile text stands in the answer.
GOLD = {"regex": ".*(a+)+b", "multiple_choice": "B"}
# Hostile answers that end with 42, the gold answer, and may be right.
HARMLESS = {"dollars", "unterminated box", "box of text"}


def check(kind: str, form: str, deadline: float, canary: pathlib.Path) -> None:
    answers = hostile_answers(str(canary))
    easy = RewardRequest("final_answer", "<think></think>42", "42")
    requests = []
    for text in answers.values():
        requests += [RewardRequest(kind, form.replace("{}", text), GOLD.get(kind, "42")), easy]
    with RewardPool(timeout_seconds=deadline, kinds=[kind]) as pool:
        start = time.monotonic()
        verdicts = [result.verdict for result in pool.score(requests)]
        seconds = time.monotonic() - start
        assert [result.verdict for result in pool.score([easy] * 4)] == ["right"] * 4
    assert verdicts[1::2] == ["right"] * len(answers) and not canary.exists()
    # The bound holds as if none ended in time; some do, just before their deadline.
    assert "crash" not in verdicts and seconds < len(answers) / 2 * deadline + 2.0
    if kind not in ("format", "length"):  # for which an answer is any text
        judged = zip(answers, verdicts[::2], strict=True)
        right = {name for name, verdict in judged if verdict == "right"}
        assert right <= HARMLESS
    assert "timeout" in verdicts or kind not in ("math", "regex")


def test_there_are_forty(tmp_path: pathlib.Path) -> None:
    assert len(hostile_answers(str(tmp_path))) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_forty_hostile_answers(kind: str, tmp_path: pathlib.Path) -> None:
    check(kind, "<think></think>\\boxed{{}}", DEADLINE, tmp_path / "canary")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{}", "${}$", "$${}$$", "Answer: {}", "\\boxed{x = {}}", "{} {}"])
@pytest.mark.parametrize("kind", ["math", "numeric", "multiple_choice", "regex"])
def test_forty_hostile_answers_of_every_form(kind: str, form: str, tmp_path: pathlib.Path) -> None:
    check(kind, "<think></think>" + form, 2.0, tmp_path / "canary")
