"""Verifiers by themselves, in this process: none of these strings may hang or raise."""

import time

import pytest

from srft_jax.config import UsageError
from srft_jax.rewards.verifiers import exact, final_answer, load_verifier


def verdict(completion: str, gold: str = "42") -> str:
    result = final_answer(completion, gold, {})
    assert result.reward == float(result.verdict == "right")
    return result.verdict


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("<think>\n40 + 2 = 42\n</think>\n42", "right"),
        ("so <think></think> 42 \n", "right"),
        ("<think>42</think>41", "wrong"),
        ("<think>42</think>", "unparsed"),
        ("<think>42</think> \n", "unparsed"),
        ("42", "unparsed"),
        ("<think>42", "unparsed"),
        ("42</think>42", "unparsed"),
        ("</think><think>42", "unparsed"),
        ("</think>42<think>42", "unparsed"),
        ("<think><think></think>42", "unparsed"),
        ("<think></think>41</think>42", "unparsed"),
        ("<think></think>42<think>", "unparsed"),
        ("<think></think>41 or 42", "wrong"),
        ("", "unparsed"),
    ],
)
def test_final_answer_is_what_follows_one_pair_of_tags(completion: str, expected: str) -> None:
    assert verdict(completion) == expected


@pytest.mark.parametrize(
    "answer, gold, expected",
    [
        ("42.0", "42", "right"),
        ("+42", "42.", "right"),
        ("042", "42", "right"),
        ("1/2", ".5", "right"),
        ("-2/4", "-0.50", "right"),
        ("0.1", "1/10", "right"),
        ("-0", "0", "right"),
        ("9007199254740993", "9007199254740992", "wrong"),  # equal as floats
        ("0.3333333333333333", "1/3", "wrong"),  # equal as floats
        ("x + 1", " x + 1 ", "right"),
        ("1/0", "1/0", "right"),  # as strings
        ("2/0", "1/0", "wrong"),
        ("1e2", "100", "wrong"),
        ("1_0", "10", "wrong"),
        ("6*7", "42", "wrong"),
        ("٤٢", "42", "wrong"),
        ("nan", "0", "wrong"),
        ("inf", "42", "wrong"),
    ],
)
def test_answers_compare_as_strings_and_as_exact_numbers(
    answer: str, gold: str, expected: str
) -> None:
    assert verdict(f"<think>a</think>{answer}", gold) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("10**10**9", "wrong"),
        ("1e999999999", "wrong"),
        ("9" * 512, "wrong"),
        ("9" * 250 + "/" + "7" * 250, "wrong"),
        ("\0", "wrong"),
        ("\0" + "42", "wrong"),
        ("\u202e24", "wrong"),
        ("\ud800", "wrong"),
        ("42" + " " * 4000, "right"),
        ("42" + " " * 5000, "unparsed"),
        ("9" * 513, "unparsed"),
        ("(" * 5000 + ")" * 5000, "unparsed"),
        ("x" * (1 << 20), "unparsed"),
        ("__import__('os')._exit(1)", "wrong"),
    ],
)
def test_hostile_answers_get_a_verdict_at_once(answer: str, expected: str) -> None:
    start = time.monotonic()
    assert verdict(f"<think></think>{answer}") == expected
    assert verdict(f"{answer}<think>{answer}</think>42") == "right"
    assert verdict(f"<think></think>{answer}", answer) in ("right", expected)
    assert time.monotonic() - start < 0.5


def test_many_tags_take_linear_time() -> None:
    start = time.monotonic()
    assert verdict("<think>" * 100_000) == verdict("</think>" * 100_000) == "unparsed"
    assert verdict("<think" * 200_000 + "<think></think>42") == "right"
    assert time.monotonic() - start < 0.5


def test_exact_compares_the_whole_completion() -> None:
    assert exact(" a b\n", "a b", {}).verdict == "right"
    assert exact("42.0", "42", {}).verdict == "wrong"
    assert exact("<think></think>42", "42", {}).verdict == "wrong"
    assert exact(" \n", "", {}).verdict == "unparsed"


def test_unknown_kind_names_the_known_ones() -> None:
    assert load_verifier("final_answer") is final_answer
    with pytest.raises(UsageError, match="'finalanswer'.*final_answer, exact"):
        load_verifier("finalanswer")
