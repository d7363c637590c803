"""Kinds without algebra, and where they find the answer."""

import time
from fractions import Fraction

import pytest

from srft_jax.config import UsageError
from srft_jax.rewards.extraction import Answer, after_reasoning, find_answer, find_boxes
from srft_jax.rewards.quantities import Quantity, last_quantity, quantity
from srft_jax.rewards.verifiers import KINDS, check_options, row_problem


def verdict(kind: str, completion: str, gold: str, **columns: object) -> str:
    result = KINDS[kind](completion, gold, columns)
    assert 0 <= result.reward <= 1 and (result.reward == 1) == (result.verdict == "right")
    return result.verdict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", Answer(r"\frac{1}{2}", True)),
        (r"\boxed {x \} y}", Answer(r"x \} y", True)),
        (r"\fbox{3} and \boxed{4", Answer("3", True)),
        (r"Answer: 5 \boxed{6}", Answer("6", True)),
        ("Answer: 5\nThe answer is **7**.\nBye", Answer("7", True)),
        ("the answer is 5, so Answer: 6", Answer("6", True)),
        ("The answer is 12. I hope it is correct.", Answer("12", True)),
        ("**Final Answer:**\n\n$\\frac12$\n", Answer(r"\frac12", True)),
        ("#### 1,000", Answer("1,000", True)),
        ("it is 3.5", Answer("it is 3.5", False)),
        ("$x$ and $y$", Answer("x$ and $y", False)),
        (" \n", None),
        (r"\boxed{}", None),
        ("Answer: " + "9" * 513, None),
    ],
)
def test_an_answer_is_found(text: str, expected: Answer | None) -> None:
    assert find_answer(text) == expected


def test_nested_and_unbalanced_boxes() -> None:
    def texts(text: str) -> list[str]:
        boxes = find_boxes(text)
        assert all(text[box.start : box.end].endswith(box.text + "}") for box in boxes)
        return [box.text for box in boxes]

    assert texts(r"\boxed{a \boxed{b} c}") == ["b", r"a \boxed{b} c"]
    assert texts(r"}} \boxed{1} } \boxed{2}") == ["1", "2"]
    start = time.monotonic()
    find_boxes(r"\boxed{" * 20_000)
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize(
    ("completion", "required", "optional"),
    [
        ("<think>a</think> b ", "b", "b"),
        ("a</think> b", None, "b"),
        (" b ", None, "b"),
        ("<think>a", None, None),
        ("<think>a</think>b</think>c", None, None),
        ("</think>a<think>", None, None),
    ],
)
def test_what_follows_the_reasoning(
    completion: str, required: str | None, optional: str | None
) -> None:
    assert after_reasoning(completion, require_think=True) == required
    assert after_reasoning(completion, require_think=False) == optional


@pytest.mark.parametrize(
    ("text", "value", "percent", "unit"),
    [
        ("1,234.50", Fraction(2469, 2), False, ""),
        (r"1{,}234\,567", Fraction(1234567), False, ""),
        ("-3/4", Fraction(-3, 4), False, ""),
        ("−7", Fraction(-7), False, ""),
        (r"\frac{3}{4}", Fraction(3, 4), False, ""),
        (r"-\dfrac34", Fraction(-3, 4), False, ""),
        ("$1,000", Fraction(1000), False, ""),
        (r"45\%", Fraction(45), True, ""),
        ("4.5 percent", Fraction(9, 2), True, ""),
        (r"1.2 \times 10^{3} \text{ cm}^2", Fraction(1200), False, "cm^2"),
        ("x = 5e-1", Fraction(1, 2), False, ""),
        ("12 square feet", Fraction(12), False, "squarefeet"),
        ("60 km/h", Fraction(60), False, "km/h"),
    ],
)
def test_quantities(text: str, value: Fraction, percent: bool, unit: str) -> None:
    assert quantity(text) == Quantity(value, percent, unit)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1/0", "1e401", "1e999999999", "12, 13", "3 or 4", "2+2", "5 and 6", "nan", "٤٢"],
)
def test_what_is_no_quantity(text: str) -> None:
    assert quantity(text) is None


def test_the_last_number_of_prose() -> None:
    assert last_quantity("so 3 of 12% are left") == Quantity(Fraction(12), True, "")
    assert last_quantity("none") is None


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        ("<think>1</think>The answer is 1,000.", "1000", "right"),
        ("She has 18 eggs", "18", "right"),
        ("Answer: 18 or 19", "19", "unparsed"),
        (r"\boxed{18, 19}", "19", "unparsed"),
        ("Answer: 45%", "0.45", "right"),
        ("Answer: 45", "45%", "right"),
        ("Answer: 45", "4500%", "right"),
        ("Answer: 12 m", "12 cm", "wrong"),
        ("Answer: 12 cm", "12", "right"),
        ("Answer: 1e3", "1000", "right"),
        ("Answer: 0.33", "1/3", "wrong"),
        ("none", "1", "unparsed"),
        ("<think>7", "7", "unparsed"),
    ],
)
def test_numeric(completion: str, gold: str, expected: str) -> None:
    assert verdict("numeric", completion, gold) == expected


def test_numeric_options() -> None:
    assert verdict("numeric", "0.33", "1/3", absolute=0.01) == "right"
    assert verdict("numeric", "0.33", "1/3", relative=0.01) == "right"
    assert verdict("numeric", "330", "1000/3", absolute=0.01) == "wrong"
    assert verdict("numeric", "Answer: 12 cm", "12", units=False) == "unparsed"
    assert verdict("numeric", "12", "12", require_think=True) == "unparsed"
    assert verdict("numeric", "12", "12", require_think=None, absolute=None) == "right"


CITIES = ["Rome", "Paris", "Bern", "Oslo"]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("B", "right"),
        ("(b)", "right"),
        ("B.", "right"),
        ("B) Paris", "right"),
        (r"\boxed{\text{B}}", "right"),
        (r"\boxed{B}", "right"),
        ("<think>A or C?</think>The answer is (B).", "right"),
        ("The answer is **B**.", "right"),
        ("The answer is B because it is", "right"),
        ("Answer: Paris", "right"),
        (r"\boxed{paris}", "right"),
        ("It cannot be (A), so option B it is", "right"),
        ("The correct option is **B**.", "right"),
        ("I think the best choice is B", "right"),
        ("The best option is A dog", "unparsed"),
        ("It cannot be (B), so it is (A)", "wrong"),
        ("C", "wrong"),
        ("A dog", "unparsed"),
        ("E", "unparsed"),
        ("Berlin", "unparsed"),
        ("Answer: A or B", "unparsed"),
    ],
)
def test_multiple_choice(completion: str, expected: str) -> None:
    assert verdict("multiple_choice", completion, "B", choices=CITIES) == expected
    assert verdict("multiple_choice", completion, "Paris", choices=CITIES) == expected


def test_choices_of_other_forms() -> None:
    arc = {"text": CITIES, "label": ["1", "2", "3", "4"]}
    assert verdict("multiple_choice", "The answer is 2", "2", choices=arc) == "right"
    assert verdict("multiple_choice", "Oslo", "2", choices=arc) == "wrong"
    assert verdict("multiple_choice", "(J)", "J") == "right"
    assert verdict("multiple_choice", "ı", "I") == "unparsed"
    with pytest.raises(ValueError, match="is not a list of 1 to 26 options"):
        verdict("multiple_choice", "A", "A", choices=7)


def test_regex_matches_the_whole_answer() -> None:
    assert verdict("regex", "Answer: 7 apples.", "7( apples)?") == "right"
    assert verdict("regex", "Answer: 77", "7") == "wrong"
    assert verdict("regex", "Answer: 77", "7", pattern="7+") == "right"
    assert verdict("regex", "", "7") == "unparsed"


def test_format_wants_one_pair_of_tags_and_an_answer() -> None:
    assert verdict("format", "<think>a</think>b", "") == "right"
    for bad in ("b", "<think>a</think>", "<think>a</think>b</think>", "<think>b", "a</think>b"):
        assert verdict("format", bad, "") == "wrong"
    assert verdict("format", "<think>a</think>b", "", boxed=True) == "wrong"
    assert verdict("format", r"<think>a</think>\boxed{b}", "", boxed=True) == "right"


def test_length_falls_linearly() -> None:
    def reward(count: int, **options: object) -> float:
        return KINDS["length"]("x" * count, "", {"full_at": 10, "zero_at": 20} | options).reward

    assert [reward(n) for n in (0, 10, 12, 20, 99)] == [1, 1, 0.8, 0, 0]
    assert [reward(n, full_at=20, zero_at=10) for n in (0, 12, 99)] == [0, 0.2, 1]
    assert reward(99, unit="tokens", num_tokens=15) == 0.5
    with pytest.raises(ValueError, match="both 20"):
        reward(1, full_at=20)
    with pytest.raises(ValueError, match="unit = 'words'"):
        reward(1, unit="words")


@pytest.mark.parametrize("completion", ["", "12", "<think></think>A", "twelve"])
@pytest.mark.parametrize(
    ("kind", "gold", "columns", "problem"),
    [
        ("numeric", "twelve", {}, "kind numeric: gold 'twelve' is not a number."),
        ("numeric", "1", {"units": "m"}, "kind numeric: option units = 'm' is not a bool."),
        (
            "multiple_choice",
            "Z",
            {"choices": CITIES},
            "kind multiple_choice: gold 'Z' is none of the options A, B, C, D.",
        ),
        ("regex", "(", {}, "kind regex: '(' is not a pattern: missing ), unterminated subpattern"),
        ("sorting", "x", {}, "kind sorting: gold 'x' is not what this kind compares."),
        ("countdown", "24", {"numbers": "24"}, "kind countdown: numbers = '24' is not a list"),
        ("maths", "1", {}, "unknown reward kind 'maths'"),
    ],
)
def test_a_bad_row_is_told_whatever_is_completed(
    completion: str, kind: str, gold: str, columns: dict[str, object], problem: str
) -> None:
    assert (row_problem(kind, gold, columns) or "").startswith(problem)
    if kind in KINDS and "units" not in columns:  # read where the answer has one
        with pytest.raises((TypeError, ValueError)):
            verdict(kind, completion, gold, **columns)


def test_good_rows_have_no_problem() -> None:
    for kind, gold in {"numeric": "12", "math": "x^{", "regex": "a+", "number_base": "1f"}.items():
        assert row_problem(kind, gold, {"num_tokens": 0, "numbers": None}) is None
    assert row_problem("countdown", "3*8", {"numbers": None}) is None
    assert row_problem("my_module:score", "", {}) is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("math", {"strict": True}, "math has no option 'strict'; its options: require_think"),
        ("exact", {"strict": True}, "exact has no option 'strict'; its options: none"),
        ("math", {"require_think": "no"}, "require_think = 'no' is not a bool"),
        ("numeric", {"relative": -1.0}, "relative = -1.0 is negative or not finite"),
        ("numeric", {"relative": float("nan")}, "relative = nan is negative or not finite"),
        ("numeric", {"relative": True}, "relative = True is not a float"),
        ("maths", {}, "unknown reward kind 'maths'"),
    ],
)
def test_bad_options(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(kind, options)
    check_options("numeric", {"relative": 0, "units": False})
    check_options("my_module:score", {"anything": 1})
