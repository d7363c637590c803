import pytest

from srft_jax.config import UsageError
from srft_jax.data.encoding import EncodedExample, check_lengths, encode, encode_sets
from srft_jax.data.sources import Example, ExampleSets


class Bytes:
    """A token a byte; prompts start with 1, completions end with 2."""

    def encode_prompt(self, text):
        return [1, *text.encode()]

    def encode_completion(self, text):
        return [*text.encode(), 2]


SETS = ExampleSets(
    train=(Example("ab", "1", ("x", "yz")), Example("abcd", "1")),
    held_out=(Example("abc", "1", ("longer than anything",)),),
    ood=(Example("abcde", "1"),),
)


def test_prompts_and_demonstrations_are_encoded_in_order():
    assert encode(SETS.train, Bytes()) == (
        EncodedExample(prompt=[1, 97, 98], demonstrations=([120, 2], [121, 122, 2])),
        EncodedExample(prompt=[1, 97, 98, 99, 100], demonstrations=()),
    )


def test_what_just_fits_is_accepted():
    encoded = encode_sets(SETS, Bytes(), max_prompt_tokens=6, max_new_tokens=3)
    for name, examples in vars(SETS).items():
        assert getattr(encoded, name) == encode(examples, Bytes())


@pytest.mark.parametrize(
    "prompt, new, problems",
    [
        (
            4,
            3,
            [
                "train, row 2: the prompt has 5 tokens, but data.max_prompt_tokens is 4.",
                "ood, row 1: the prompt has 6 tokens, but data.max_prompt_tokens is 4.",
            ],
        ),
        (
            6,
            2,
            ["train, row 1: demonstration 2 has 3 tokens, but rollout.max_new_tokens is 2."],
        ),
        (
            5,
            1,
            [
                "ood, row 1: the prompt has 6 tokens, but data.max_prompt_tokens is 5.",
                "train, row 1: demonstration 1 has 2 tokens, but rollout.max_new_tokens is 1.",
                "train, row 1: demonstration 2 has 3 tokens, but rollout.max_new_tokens is 1.",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_named(prompt, new, problems):
    with pytest.raises(UsageError) as error:
        encode_sets(SETS, Bytes(), max_prompt_tokens=prompt, max_new_tokens=new)
    assert str(error.value).split("\n") == problems


def test_held_out_rows_are_named_and_their_demonstrations_may_be_long():
    encoded = encode_sets(SETS, Bytes(), max_prompt_tokens=6, max_new_tokens=3)
    with pytest.raises(UsageError, match="held_out, row 1: the prompt has 4 tokens"):
        check_lengths(encoded, max_prompt_tokens=3, max_new_tokens=3)
