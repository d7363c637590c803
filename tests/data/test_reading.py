"""Rows of every schema, and everything that can be wrong with one."""

import pytest

from srft_jax.config import SourceConfig
from srft_jax.data.examples import Example, Turn
from srft_jax.data.reading import BadRow, read_example
from srft_jax.data.source_rows import Row

GOOD = {"prompt": "1+2", "answer": "3"}
VERL = {
    "data_source": "openr1",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+2"}],
    "target": [{"role": "assistant", "content": "<think>3</think>3"}],
    "ability": "math",
    "reward_model": {"ground_truth": "3", "style": "rule"},
    "extra_info": {"index": 7},
}
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "1+2"},
    {"role": "assistant", "content": "3"},
]
ARC = {"id": "x", "question": "2+2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}}
MMLU_PRO = {"question": "2+2?", "options": ["3", "4", "5"], "answer": "B", "answer_index": 1}
GPQA = {"Question": "2+2?", "Correct Answer": "4"} | {
    f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)
}


def read(row, **source):
    return read_example(Row("file, row 1", row), SourceConfig(**source))


def problems(row, **source):
    with pytest.raises(BadRow) as error:
        read(row, **source)
    return error.value.problems


# Case -> row, how it is read, and what the example must say beside where it stands.
READ = {
    "plain": (GOOD, {}, {}),
    "numbers": (GOOD | {"answer": 3.0}, {}, {}),
    "demonstrations": (
        GOOD | {"demonstrations": ["a", "b"], "behavior_logprobs": [[-1], [-0.5, 0]]},
        {},
        {"demonstrations": ("a", "b"), "behavior_logprobs": ((-1.0,), (-0.5, 0.0))},
    ),
    "one demonstration": (
        GOOD | {"demonstration": "a", "demonstrations": None, "behavior_logprobs": [-1, -2]},
        {},
        {"demonstrations": ("a",), "behavior_logprobs": ((-1.0, -2.0),)},
    ),
    "none": (GOOD | {"demonstrations": [], "behavior_logprobs": None}, {}, {}),
    "other columns": (GOOD | {"n": [1, None]}, {}, {}),
    "kind of the source": (GOOD, {"kind": "exact"}, {"kind": "exact"}),
    "kind of the row": (GOOD | {"kind": "math"}, {"kind": "exact"}, {"kind": "math"}),
    "verl": (
        VERL,
        {},
        {
            "demonstrations": ("<think>3</think>3",),
            "kind": "math",
            "history": (Turn("system", "Think."),),
        },
    ),
    "verl with a string": (
        {"prompt": "1+2", "target": "a", "reward_model": {"ground_truth": 3}},
        {"kind": "exact"},
        {
            "demonstrations": ("a",),
            "kind": "exact",
        },
    ),
    "DAPO": (
        VERL | {"reward_model": {"ground_truth": "3", "style": "rule-lighteval/MATH_v2"}},
        {"columns": {"demonstrations": "ability"}},
        {
            "demonstrations": ("math",),
            "kind": "math",
            "history": (Turn("system", "Think."),),
        },
    ),
    "chat": (
        {"messages": CHAT, "answer": "3"},
        {},
        {
            "demonstrations": ("3",),
            "history": (Turn("user", "hello"), Turn("assistant", "hi")),
        },
    ),
    "chat without a demonstration": (
        {"messages": CHAT[:1] + CHAT[2:3], "ground_truth": "3"},
        {},
        {"history": (Turn("user", "hello"),)},
    ),
    "chat whose answer is mapped": (
        {"messages": CHAT[2:], "gold": {"value": ["3"]}},
        {"columns": {"answer": "gold.value.0"}},
        {"demonstrations": ("3",)},
    ),
    "chat whose answer is boxed": (
        {"messages": [CHAT[2], {"role": "assistant", "content": r"so \boxed{3}"}]},
        {"answer_from": "boxed"},
        {"demonstrations": (r"so \boxed{3}",)},
    ),
    "mapped": (
        {"q": "1+2", "a": {"b": "3"}, "s": ["x"], "kind": "not a verifier"},
        {"columns": {"prompt": "q", "answer": "a.b", "demonstrations": "s"}},
        {"demonstrations": ("x",)},
    ),
    "GSM8K": (
        {"question": "1+2", "answer": "1+2 = <<1+2=3>>3\n#### 3"},
        {
            "columns": {"prompt": "question", "answer": "answer", "demonstrations": "answer"},
            "answer_from": "hashes",
        },
        {"demonstrations": ("1+2 = <<1+2=3>>3\n#### 3",)},
    ),
}


@pytest.mark.parametrize(("row", "source", "fields"), READ.values(), ids=READ)
def test_rows_become_examples(row, source, fields):
    """All columns of the row are there for its verifier."""
    expected = {"prompt": "1+2", "answer": "3", "where": "file, row 1", "metadata": row} | fields
    assert read(row, **source) == Example(**expected)


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        (r"\boxed{1}, no: \boxed{\frac{1}{2}} it is", "boxed", r"\frac{1}{2}"),
        (r"\fbox {1}", "boxed", "1"),
        (r"$\boxed{\left\{1, 2\right.}$", "boxed", r"\left\{1, 2\right."),
        (r"so $\boxed 5$.", "boxed", "5"),
        (r"is \boxed{1}, not \boxed 2", "boxed", "1"),
        ("16 eggs\n#### 1,018 ", "hashes", "1018"),
    ],
)
def test_answers_are_taken_out_of_solutions(text, how, answer):
    assert read({"prompt": "q", "answer": text}, answer_from=how).answer == answer


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("row", "right"),
    [
        (ARC | {"answerKey": "2"}, "4"),
        (ARC | {"choices": {"text": ["4", "3"], "label": [1, 2]}, "answerKey": 1}, "4"),
        (MMLU_PRO, "4"),
        (GPQA, "4"),
        (GPQA | {"Correct Answer": "B", "Incorrect Answer 1": "A"}, "B"),
        (GPQA | {"Incorrect Answer 1": "4"}, "4"),
    ],
)
def test_options_are_lettered(row, right, shuffle):
    example = read(row, shuffle_options=shuffle)
    question, blank, *lines = example.prompt.split("\n")
    assert (question, blank) == ("2+2?", "")
    assert lines == [
        f"{letter}. {option}"
        for letter, option in zip("ABCD", example.metadata["choices"], strict=False)
    ]
    assert example.metadata["choices"]["ABCD".index(example.answer)] == right
    assert example.kind == "multiple_choice"
    assert example == read(row, shuffle_options=shuffle)


def test_options_are_shuffled_by_their_text_alone():
    """All places are taken about equally often; with a demonstration, which has letters, none."""
    rows = [MMLU_PRO | {"question": f"{i}?"} for i in range(300)]
    answers = [read(row).answer for row in rows]
    assert all(70 < answers.count(letter) < 130 for letter in "ABC")
    assert {read(row, shuffle_options=False).answer for row in rows} == {"B"}
    assert {read(row | {"demonstration": "B"}).answer for row in rows} == {"B"}
    assert [read(row | {"id": 1}).answer for row in rows] == answers


BAD = {
    "a list": ([1], {}, ["a list, but a row is an object with prompt and answer."]),
    "null": (None, {}, ["null, but a row is an object with prompt and answer."]),
    "no prompt": (
        {"answer": "3"},
        {},
        ["'prompt' is missing; the row has answer, see `columns`."],
    ),
    "no answer": (
        {"prompt": "1"},
        {},
        ["'answer' is missing; the row has prompt, see `columns`."],
    ),
    "misspelt prompt": (
        {"promt": "1", "answer": "3"},
        {},
        ["'prompt' is missing; did you mean 'promt'?"],
    ),
    "boolean": (
        GOOD | {"answer": True},
        {},
        ["'answer' is a boolean, but must be a string."],
    ),
    "null prompt": (GOOD | {"prompt": None}, {}, ["'prompt' is null, but must be a string."]),
    "blank": (GOOD | {"prompt": " \n"}, {}, ["'prompt' is empty."]),
    "surrogate": (
        GOOD | {"answer": "a\ud83d"},
        {},
        ["'answer' has half a surrogate pair as character 2."],
    ),
    "kind": (GOOD | {"kind": 1}, {}, ["'kind' is a number, but must be a string."]),
    "misspelt field": (
        GOOD | {"demonstratoins": []},
        {},
        ["unknown field 'demonstratoins'; did you mean 'demonstrations'?"],
    ),
    "both": (
        GOOD | {"demonstration": "x", "demonstrations": ["x"]},
        {},
        ["both 'demonstrations' and 'demonstration'; give one of them."],
    ),
    "several": (
        GOOD | {"answer": [], "demonstrations": ["x", 1, ""]},
        {},
        [
            "'demonstrations', number 2 is a number, but must be a string.",
            "'demonstrations', number 3 is empty.",
            "'answer' is a list, but must be a string.",
        ],
    ),
    "role": (
        VERL | {"prompt": [{"role": "human", "content": "x"}]},
        {},
        ["'prompt', message 1 has the role 'human', which is none of system, user, assistant."],
    ),
    "no turns": (VERL | {"prompt": []}, {}, ["'prompt' is an empty list."]),
    "no user turn": (
        VERL | {"prompt": VERL["prompt"][:1]},
        {},
        ["'prompt' has no user turn at its end to be answered."],
    ),
    "content": (
        VERL | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        {},
        ["'prompt', message 1: 'content' is a list, but must be a string."],
    ),
    "target": (
        VERL | {"target": [{"role": "user", "content": "x"}]},
        {},
        ["'target', number 1 has the role 'user', but must be the assistant's."],
    ),
    "style": (
        VERL | {"reward_model": {"ground_truth": "3", "style": "model"}},
        {},
        ["'reward_model.style' is not 'rule', so that the row names no verifier; set `kind`."],
    ),
    "mapped column": (
        {"q": "1", "solutoin": "3"},
        {"columns": {"prompt": "q", "answer": "solution"}},
        ["'solution' is missing; did you mean 'solutoin'?"],
    ),
    "no box": (
        GOOD,
        {"answer_from": "boxed"},
        [r"'answer' has no answer in \boxed{}."],
    ),
    "open box": (
        GOOD | {"answer": r"\boxed{\frac{1}{2}"},
        {"answer_from": "boxed"},
        [r"'answer' has no answer in \boxed{}."],
    ),
    "nothing to take from": (
        {"prompt": "1"},
        {"answer_from": "hashes"},
        ["neither an answer nor a demonstration that it could be taken from (####)."],
    ),
    "logprobs": (
        GOOD | {"demonstrations": ["a", "b"], "behavior_logprobs": [[-1]]},
        {},
        [
            "'behavior_logprobs' is 1 lists, but must be a list of numbers for each of the "
            "2 demonstrations."
        ],
    ),
    "positive logprob": (
        GOOD | {"demonstration": "a", "behavior_logprobs": [-1, 0.5]},
        {},
        ["'behavior_logprobs', number 1, is not a list of numbers that are at most 0."],
    ),
    "no such option": (
        MMLU_PRO | {"answer_index": 3},
        {},
        ["'answer_index' is neither the number nor the label nor the text of one option."],
    ),
    "one option": (
        MMLU_PRO | {"options": ["4"], "answer_index": 0},
        {},
        ["'options' has 1 entries, but must have 2 to 26."],
    ),
    "labels": (
        ARC | {"choices": {"text": ["3", "4"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        {},
        ["2 options, but 3 labels."],
    ),
}


@pytest.mark.parametrize(("row", "source", "expected"), BAD.values(), ids=BAD)
def test_every_problem_of_a_row(row, source, expected):
    assert problems(row, **source) == expected
