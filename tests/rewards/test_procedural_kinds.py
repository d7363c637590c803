"""Kinds of the procedural families: what is right, and that hostile text gets a verdict at once."""

import random
import time
from fractions import Fraction

import pytest

from srft_jax.rewards.procedural import countdown, number_base, read_expression, sorting

HOSTILE = [
    "(" * 5000 + "1" + ")" * 5000,
    "(" * 250 + "1" + ")" * 250,
    "-" * 512,
    "9**9**9**9",
    "9" * 512,
    "1/" * 200 + "1",
    "7 33" + " " * 3000 + "52",
    ", " * 2000,
    "__import__('os')._exit(1)",
    "\0",
    "\u202e24",
    "\ud800",
    "٤*٦",
    "x" * (1 << 20),
]


def verdict(kind, answer, gold, **metadata):
    result = kind(f"<think>a</think>{answer}", gold, metadata)
    assert result.reward == float(result.verdict == "right")
    return result.verdict


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("(3+5)*4-8", "right"),
        (" ( 5 + 3 ) * 4 - 8", "right"),
        ("-(8-4*(5+3))", "right"),
        ("8*(5-4)*3", "right"),
        ("8/4*(5+3)", "wrong"),
        ("(3+5)*4", "wrong"),  # 32, and not all numbers
        ("8*3", "wrong"),  # 24, but not of all numbers
        ("(3+5)*4-8+8-8", "wrong"),  # 24, but of more numbers
        ("24", "wrong"),
        ("3 5 4 8", "unparsed"),
        ("(3+5)*4-8=24", "unparsed"),
        ("(3+5)*4-8)", "unparsed"),
        ("((3+5)*4-8", "unparsed"),
        ("3+5)*(4-8", "unparsed"),
        ("(3+5)4-8", "unparsed"),
        ("3+5-", "unparsed"),
        ("3+-5", "unparsed"),
        ("()", "unparsed"),
        ("8/(5-4-1)*3", "unparsed"),
        ("it is (3+5)*4-8", "unparsed"),
        ("3.0+5", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_countdown_takes_any_expression_of_the_target_with_each_number_once(answer, expected):
    assert verdict(countdown, answer, "(3+5)*4-8") == expected
    assert verdict(countdown, answer, "24", numbers=[8, 5, 4, 3]) == expected


def test_countdown_counts_equal_numbers_and_works_with_fractions():
    assert verdict(countdown, "8/(3-8/3)", "24", numbers=[8, 8, 3, 3]) == "right"
    assert verdict(countdown, "8*3", "24", numbers=[8, 8, 3, 3]) == "wrong"
    assert verdict(countdown, "(1/3)*3", "1", numbers=[1, 3, 3]) == "right"


def test_expressions_agree_with_python():
    rng = random.Random(0)
    for _ in range(300):
        tokens = [str(rng.randint(1, 9))]
        for _ in range(rng.randint(1, 8)):
            tokens += [rng.choice("+-*/"), str(rng.randint(1, 9))]
            if rng.random() < 0.5:
                start = 2 * rng.randrange(len(tokens) // 2 + 1)
                tokens[start] = "(" + tokens[start]
                tokens[-1] += ")"
        text = "".join(tokens)
        exact = "".join(f"Fraction({c})" if c.isdigit() else c for c in text)
        try:
            value = eval(exact, {"Fraction": Fraction})
        except ZeroDivisionError:
            assert read_expression(text) is None
        else:
            assert read_expression(text) == (value, sorted(int(c) for c in text if c.isdigit()))


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("7 33 52", "right"),
        ("7,33 , 52", "right"),
        ("[7, 33, 52]", "right"),
        ("\n7\n33\n52\n", "right"),
        ("7 33 52 81", "wrong"),
        ("7 33", "wrong"),
        ("33 7 52", "wrong"),
        ("73352", "wrong"),
        ("7 33 52.", "right"),
        ("sorted: 7 33 52", "unparsed"),
        ("7 < 33 < 52", "unparsed"),
        ("[]", "unparsed"),
    ],
)
def test_sorting_compares_the_whole_list(answer, expected):
    assert verdict(sorting, answer, "7 33 52") == expected


def test_numerals_compare_without_regard_to_capitals_and_leading_zeros():
    assert verdict(number_base, "01F", "1f") == "right"
    assert verdict(number_base, "000", "0") == "right"
    assert verdict(number_base, "1f0", "1f") == verdict(number_base, "1", "1f") == "wrong"
    assert verdict(number_base, "1f.0", "1f") == verdict(number_base, "1 f", "1f") == "unparsed"


@pytest.mark.parametrize(
    "kind, gold", [(countdown, "(3+5)*4-8"), (sorting, "7 33 52"), (number_base, "1f")]
)
def test_the_reasoning_is_required_unless_the_row_says_otherwise(kind, gold):
    assert kind(f"<think></think>{gold}", gold, {}).verdict == "right"
    assert kind(gold, gold, {}).verdict == "unparsed"
    assert kind(gold, gold, {"require_think": False}).verdict == "right"


@pytest.mark.parametrize(
    "kind, gold", [(countdown, "(3+5)*4-8"), (sorting, "7 33 52"), (number_base, "1f")]
)
@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_answers_get_a_verdict_at_once(kind, gold, answer):
    start = time.monotonic()
    assert verdict(kind, answer, gold) in ("wrong", "unparsed")
    assert kind(f"<think>{answer}</think>{gold}", gold, {}).verdict == "right"
    assert time.monotonic() - start < 0.2


@pytest.mark.parametrize("kind", [countdown, sorting, number_base])
def test_gold_that_cannot_be_compared_with_is_an_error(kind):
    with pytest.raises(ValueError, match="gold 'n/a' is not what"):
        kind("<think></think>1", "n/a", {})


@pytest.mark.parametrize("numbers", ["3 5", [3.0], [True], ["3"]])
def test_numbers_of_another_type_are_an_error(numbers):
    with pytest.raises(TypeError, match="numbers = .* is not a list of whole numbers"):
        verdict(countdown, "3*8", "24", numbers=numbers)
