import dataclasses

import numpy as np
import pytest

from srft_jax.config import UsageError
from srft_jax.data.encoding import Dropped, Limits, conversation, encode, encode_sets
from srft_jax.data.examples import Example, ExampleSets, Turn


class Bytes:
    """A token a byte; turns start with 1, completions end with 2."""

    def encode_prompts(self, conversations):
        return [[x for _, text in turns for x in (1, *text.encode())] for turns in conversations]

    def encode_completions(self, texts):
        return [[*text.encode(), 2] for text in texts]


SETS = ExampleSets(
    train=(Example("ab", "1", ("x", "yz")), Example("abcd", "1")),
    evaluation={
        "held_out": (Example("abc", "1", ("longer than anything",)),),
        "ood": (Example("abcde", "1"),),
    },
)


def plain(encoded):
    return [(one.prompt.tolist(), [ids.tolist() for ids in one.demonstrations]) for one in encoded]


def limits(prompt, demonstration, too_long="error"):
    return Limits(prompt, demonstration, too_long)


def test_prompts_and_demonstrations_are_encoded_in_order():
    encoded = encode(SETS.train, Bytes())
    assert plain(encoded) == [
        ([1, 97, 98], [[120, 2], [121, 122, 2]]),
        ([1, 97, 98, 99, 100], []),
    ]
    assert encoded[0].behavior_logprobs == (None, None)
    assert {one.dtype for one in (encoded[0].prompt, *encoded[0].demonstrations)} == {
        np.dtype("i4")
    }


@pytest.mark.parametrize("count", [0, 256, 600])
def test_chunks_join_without_a_seam(count):
    examples = [Example(str(n), "1", (f"d{n}",) * (n % 3)) for n in range(count)]
    expected = [([1, *str(n).encode()], [[*f"d{n}".encode(), 2]] * (n % 3)) for n in range(count)]
    assert plain(encode(examples, Bytes())) == expected


def test_a_system_prompt_goes_first_where_there_is_none():
    earlier = (Turn("user", "q"), Turn("assistant", "a"))
    own = (Turn("system", "own"), *earlier)
    last = Turn("user", "ab")
    assert conversation(Example("ab", "1")) == [last]
    assert conversation(Example("ab", "1"), "given") == [Turn("system", "given"), last]
    assert conversation(Example("ab", "1"), "") == [Turn("system", ""), last]
    with_history = [Turn("system", "given"), *earlier, last]
    assert conversation(Example("ab", "1", history=earlier), "given") == with_history
    assert conversation(Example("ab", "1", history=own), "given") == [*own, last]
    encoded = encode([Example("b", "1", history=own)], Bytes(), system_prompt="given")
    assert bytes(encoded[0].prompt.astype(np.uint8)) == b"\1own\1q\1a\1b"


def test_what_just_fits_is_accepted():
    encoded = encode_sets(SETS, Bytes(), limits(6, 3))
    assert encoded.texts == {"train": SETS.train, **SETS.evaluation}
    assert plain(encoded.train) == plain(encode(SETS.train, Bytes()))
    for name, examples in SETS.evaluation.items():
        assert plain(encoded.evaluation[name]) == plain(encode(examples, Bytes()))
    assert encoded.dropped == dict.fromkeys(("train", "held_out", "ood"), Dropped())


DEMONSTRATION = ", but data.max_demonstration_tokens is"
FIX = "; raise it, or set data.too_long to drop."


@pytest.mark.parametrize(
    "prompt, new, problems",
    [
        (
            4,
            3,
            [
                "train, row 2: the prompt has 5 tokens, but data.max_prompt_tokens is 4" + FIX,
                "ood, row 1: the prompt has 6 tokens, but data.max_prompt_tokens is 4" + FIX,
                "ood: no prompt fits, so nothing is left of the set.",
            ],
        ),
        (
            6,
            2,
            [f"train, row 1: demonstration 2 has 3 tokens{DEMONSTRATION} 2{FIX}"],
        ),
        (
            6,
            1,
            [
                f"train, row 1: demonstration 1 has 2 tokens{DEMONSTRATION} 1{FIX}",
                f"train, row 1: demonstration 2 has 3 tokens{DEMONSTRATION} 1{FIX}",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_named(prompt, new, problems):
    with pytest.raises(UsageError) as error:
        encode_sets(SETS, Bytes(), limits(prompt, new))
    told = str(error.value).split("\n")
    assert told[: len(problems)] == problems
    assert len(told) == len(problems) + (len(problems) > 1)
    if len(problems) > 1:
        assert told[-1].startswith("The longest prompt has 6 tokens, the longest demonstration 3: ")
        assert "--data.max_prompt_tokens 6 --data.max_demonstration_tokens 3 and" in told[-1]


def test_rows_are_named_as_their_source_names_them():
    named = dataclasses.replace(SETS.train[1], where="a.jsonl, row 7")
    with pytest.raises(UsageError, match="^a.jsonl, row 7: the prompt has 5 tokens"):
        encode_sets(ExampleSets((SETS.train[0], named), {}), Bytes(), limits(4, 9))


def test_what_does_not_fit_may_be_dropped():
    """A demonstration with its log-probs, a prompt with its row; both are counted."""
    train = (
        Example("ab", "1", ("long", "s", "longer"), behavior_logprobs=((-4.0,) * 5, (-1.0,), ())),
        Example("much too long", "2", ("s", "long")),
        Example("cd", "3", ("long",)),
        Example("ef", "4"),
    )
    sets = ExampleSets(train, {"ood": (Example("abcdef", "1"), Example("g", "1", ("long",)))})
    encoded = encode_sets(sets, Bytes(), limits(4, 2, "drop"))
    train = encoded.texts["train"]
    assert [one.answer for one in train] == ["1", "3", "4"]
    assert [one.demonstrations for one in train] == [("s",), (), ()]
    assert train[0].behavior_logprobs == ((-1.0,),)
    assert plain(encoded.train) == plain(encode(train, Bytes()))
    np.testing.assert_array_equal(encoded.train[0].behavior_logprobs[0], [-1, 0])
    assert encoded.texts["ood"] == sets.evaluation["ood"][1:]  # not trained on: may be long
    assert len(encoded.evaluation["ood"]) == 1
    assert encoded.dropped == {"train": Dropped(1, 3, 1), "ood": Dropped(1, 0, 0)}


def test_a_set_of_which_nothing_is_left():
    with pytest.raises(UsageError, match="^ood: no prompt fits, so nothing is left of the set.$"):
        encode_sets(SETS, Bytes(), limits(5, 3, "drop"))


@pytest.mark.parametrize(
    ("given", "stored"), [((-1.0, -2.0, -3.0), [-1, -2, -3]), ((-1.0, -2.0), [-1, -2, 0])]
)
def test_behavior_logprobs_with_or_without_that_of_eos(given, stored):
    example = Example("ab", "1", ("x", "yz"), behavior_logprobs=((), given))
    encoded = encode_sets(ExampleSets((example,), {}), Bytes(), limits(9, 9))
    unknown, known = encoded.train[0].behavior_logprobs
    assert unknown is None and known.dtype == np.float32
    np.testing.assert_array_equal(known, stored)


@pytest.mark.parametrize("count", [1, 4])
def test_behavior_logprobs_of_another_number(count):
    example = Example("ab", "1", ("yz",), behavior_logprobs=((-1.0,) * count,))
    with pytest.raises(UsageError, match=f"demonstration 1 has {count} behavior log-probs, but 3 "):
        encode_sets(ExampleSets((example,), {}), Bytes(), limits(9, 9, "drop"))
