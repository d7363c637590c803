import dataclasses
import time

import pytest

from srft_jax.config import ArithmeticConfig, UsageError
from srft_jax.data.arithmetic import is_held_out, make_demonstration, make_sets

CONFIG = ArithmeticConfig(num_train=300, num_demonstrated=40, num_held_out=60, num_ood=50)
SHORT = dataclasses.replace(
    CONFIG, operators="+", min_terms=2, max_terms=2, ood_min_terms=3, ood_max_terms=3
)


def solve(prompt):
    """Python's own arithmetic on brackets written from the left, then the last digit."""
    expression = prompt[0]
    for operator, digit in zip(prompt[1::2], prompt[2::2], strict=True):
        expression = f"({expression}{operator}{digit})"
    return str(eval(expression) % 10)


def test_the_demonstration_is_spelled_as_documented():
    assert make_demonstration("7+5*3-4") == "<think>2 6 2</think>2"
    assert make_demonstration("7+5*3-4", terse=True) == "<think></think>2"


def test_a_share_of_the_demonstrations_is_terse():
    sets = make_sets(dataclasses.replace(CONFIG, num_demonstrated=300, terse_fraction=0.6))
    texts = [example.demonstrations[0] for example in sets.train]
    terse = [f"<think></think>{example.answer}" for example in sets.train]
    share = sum(a == b for a, b in zip(texts, terse, strict=True)) / 300
    assert 0.5 < share < 0.7
    assert not any("<think></think>" in x.demonstrations[0] for x in make_sets(CONFIG).train[:40])


def test_answers_and_demonstrations_are_right():
    sets = make_sets(CONFIG)
    for example in (*sets.train, *sets.held_out, *sets.ood):
        assert example.answer == solve(example.prompt)
        for demonstration in example.demonstrations:
            thinking, answer = demonstration.removeprefix("<think>").split("</think>")
            assert thinking.split(" ") == [
                solve(example.prompt[:end]) for end in range(3, len(example.prompt) + 1, 2)
            ]
            assert answer == example.answer


def test_only_the_first_training_prompts_are_demonstrated():
    sets = make_sets(CONFIG)
    assert [len(x.demonstrations) for x in sets.train] == [1] * 40 + [0] * 260
    assert not any(x.demonstrations for x in (*sets.held_out, *sets.ood))


def test_sets_have_their_sizes_ranges_and_no_problem_twice():
    sets = make_sets(CONFIG)
    prompts = [x.prompt for x in (*sets.train, *sets.held_out, *sets.ood)]
    assert len(set(prompts)) == len(prompts) == 300 + 60 + 50
    for examples, counts in (
        (sets.train, {4, 5, 6}),
        (sets.held_out, {4, 5, 6}),
        (sets.ood, {7, 8}),
    ):
        assert {(len(x.prompt) + 1) // 2 for x in examples} == counts
        assert set("".join(x.prompt for x in examples)) == set("0123456789+-*")


def test_operators_can_be_chosen():
    sets = make_sets(dataclasses.replace(CONFIG, operators="-"))
    assert set("".join(x.prompt for x in sets.train)) == set("0123456789-")


def test_golden_problems():
    """If this moves, every recorded result on this family is of other data: say so in the notes."""
    sets = make_sets(ArithmeticConfig())
    first = [examples[0].prompt for examples in (sets.train, sets.held_out, sets.ood)]
    assert first == ["3*2-7+0", "5-8*2*2", "1*5-5+9*1*0+2-9"]


def test_the_same_seed_gives_the_same_sets_and_another_seed_others():
    assert make_sets(CONFIG) == make_sets(CONFIG)
    other = make_sets(dataclasses.replace(CONFIG, seed=1))
    for mine, others in zip(vars(make_sets(CONFIG)).values(), vars(other).values(), strict=True):
        assert not {x.prompt for x in mine} & {x.prompt for x in others[:10]}


def test_growing_a_set_keeps_its_start_and_moves_nothing_across():
    small = make_sets(CONFIG)
    large = make_sets(dataclasses.replace(CONFIG, num_train=3000, num_held_out=500))
    assert large.train[:300] == small.train
    assert large.held_out[:60] == small.held_out


def test_no_seed_trains_on_what_another_holds_out():
    for seed in (0, 1):
        sets = make_sets(dataclasses.replace(CONFIG, seed=seed))
        assert not any(is_held_out(x.prompt) for x in sets.train)
        assert all(is_held_out(x.prompt) for x in sets.held_out)


def test_every_problem_that_exists_can_be_had_and_not_one_more():
    """10 * 10 = 100 sums of two digits; training and held-out ones are all of them."""
    config = dataclasses.replace(SHORT, num_demonstrated=0, num_held_out=0)
    with pytest.raises(UsageError, match=r"num_train asks for 300 .* only 89 distinct train"):
        make_sets(config)
    sets = make_sets(dataclasses.replace(config, num_train=89, num_held_out=11))
    assert len({x.prompt for x in (*sets.train, *sets.held_out)}) == 100


@pytest.mark.parametrize(
    "change, message",
    [
        ({"min_terms": 1}, "2 <= min_terms <= max_terms, got 1 and 6"),
        ({"min_terms": 7}, "2 <= min_terms <= max_terms, got 7 and 6"),
        ({"ood_min_terms": 6}, "max_terms < ood_min_terms <= ood_max_terms, got 6, 6 and 8"),
        ({"ood_max_terms": 6}, "got 6, 7 and 6"),
        ({"operators": "+/"}, "operators are some of"),
        ({"operators": "++"}, "each once"),
        ({"operators": ""}, "got ''"),
        ({"terse_fraction": 1.5}, "between 0 and 1, got 1.5"),
        ({"num_ood": -1}, "num_ood is at least 0, got -1"),
        ({"num_demonstrated": 301}, "between 0 and num_train = 300, got 301"),
        ({"num_demonstrated": -1}, "between 0 and num_train = 300, got -1"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(UsageError, match=message):
        make_sets(dataclasses.replace(CONFIG, **change))


def test_twenty_thousand_problems_take_well_under_a_second():
    start = time.process_time()
    make_sets(ArithmeticConfig(num_train=20_000))
    assert time.process_time() - start < 1.0
