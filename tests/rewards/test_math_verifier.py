"""The kind `math`, in this process: what it reads, what it calls the same, and what it never asks.

None of Math-Verify's own test cases stand here.
"""

from unittest import mock

import math_verify
import pytest

from srft_jax.rewards.math import math, verify_math


def verdict(completion: str, gold: str, **options: object) -> str:
    result = math(completion, gold, options)
    assert result.reward == float(result.verdict == "right")
    return result.verdict


@pytest.mark.parametrize(
    ("tail", "gold", "expected"),
    [
        (r"\boxed{\frac12}", "0.5", "right"),
        (r"So it is \boxed{\frac{1}{2}}.", r"\frac{2}{4}", "right"),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", "right"),
        (r"2\sqrt{3}", r"\sqrt{12}", "right"),
        ("x^2 + 2x + 1", "$(x+1)^2$", "right"),
        ("2x + 1", "2", "wrong"),  # though Math-Verify finds a 2 in it
        (r"\boxed{(-\infty, 3]}", r"$x \in (-\infty, 3]$", "right"),
        (r"\boxed{(-\infty, 3)}", r"$(-\infty, 3]$", "wrong"),
        (r"\boxed{\{3, 1, 2\}}", r"$\{1, 2, 3\}$", "right"),
        (r"\boxed{x = 7}", "7", "right"),
        (r"\boxed{45\%}", "45", "right"),
        (r"\boxed{1,234}", "1234", "right"),
        (r"\boxed{12 \text{ cm}}", "12", "right"),
        (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}",
         r"$\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}$", "right"),
        ("The answer is 7.", "7", "right"),
        ("**Answer:** $x+1$\n\nI hope it is correct.", "$1+x$", "right"),
        ("Of the 12 there are 9 left.", "9", "right"),
        ("#### 18", "18", "right"),
        (r"First \boxed{3}, or rather \boxed{4}.", "4", "right"),
        (r"First \boxed{3}, or rather \boxed{4}.", "3", "wrong"),
        (r"First \boxed{x+3}, or rather \boxed{x+4}.", "$4+x$", "right"),
        (r"First \boxed{x+3}, or rather \boxed{x+4}.", "$3+x$", "wrong"),
        (r"$\boxed{1}, \boxed{2}$", r"$\{1, 2\}$", "right"),
        (r"$\boxed{1}, \boxed{2}$", "2", "wrong"),
        (r"\boxed{0.333333}", r"\frac13", "right"),  # six decimals of a float count
        (r"\boxed{0.3333}", r"\frac13", "wrong"),
        (r"\boxed{\text{no solution}}", r"\text{no solution}", "right"),
        (r"\boxed{}", "1", "unparsed"),
        ("I do not know", "1", "unparsed"),
        (r"\boxed{42", "42", "unparsed"),
        ("", "1", "unparsed"),
    ],
)  # fmt: skip
def test_answers_are_the_same_mathematics(tail: str, gold: str, expected: str) -> None:
    assert verdict(f"<think>\n\\boxed{{99}}\n</think>\n{tail}", gold) == expected
    assert verify_math(tail, gold).verdict == expected


def test_long_tails_are_read_at_their_marks() -> None:
    prose = "This is how it goes: $a$ and $b$. " * 40
    assert verify_math(rf"{prose} \boxed{{\frac12}} {prose}", "0.5").verdict == "right"
    assert verify_math(f"{prose}\nAnswer: 2x+1\n{prose}", "$1+2x$").verdict == "right"
    assert verify_math(f"{prose} We find $12$", "12").verdict == "right"
    assert verify_math(r"\boxed{7}" + prose * 4, "7").verdict != "right"  # 4 KB before the end


@pytest.mark.parametrize("form", ["{}", "<think>{}", "{}</think>{}", "<think></think>{}<think>"])
def test_both_tags_are_required_unless_the_option_says_otherwise(form: str) -> None:
    answer = form.replace("{}", r"\boxed{7}")
    assert verdict(answer, "7") == "unparsed"
    expected = "right" if "<think>" not in form else "unparsed"
    assert verdict(answer, "7", require_think=False) == expected


def test_strings_and_numbers_ask_no_library() -> None:
    with mock.patch("math_verify.parse", side_effect=AssertionError):
        assert verify_math("$x^2+1$", "x^2+1").verdict == "right"
        assert verify_math(r"\boxed{3/4}", "0.75").verdict == "right"
        assert verify_math("Answer: 12", "13").verdict == "wrong"
        assert verify_math("10^{1000000000}", "1").verdict == "wrong"
        assert verify_math("2000000!", "1").verdict == "wrong"
        assert verify_math("(" * 30 + "1" + ")" * 30, "1").verdict == "unparsed"
        with pytest.raises(AssertionError):
            verify_math(r"\boxed{\frac34}", "0.75")


def test_repetition_is_cheap() -> None:
    """What a policy that has gone astray writes most is not read as LaTeX, which takes seconds."""
    with mock.patch("math_verify.parse", wraps=math_verify.parse) as parse:
        for text in ("ha hay " * 3000, "x" * 100_000, "\n" * 5000, "the answer is " * 900):
            assert verify_math(text, "1").verdict == "unparsed"
        joined = r"\boxed{1}" + ", and x_{1} = " * 250
        assert verify_math(joined + r"no \boxed{2}", "2").verdict == "right"
    assert not [call for call in parse.call_args_list if call.args[0].startswith("$")]
