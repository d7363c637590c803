import dataclasses
import time

import pytest

from srft_jax.config import ArithmeticConfig, UsageError
from srft_jax.data.arithmetic import is_held_out, make_demonstration, make_sets

CONFIG = ArithmeticConfig(num_train=300, num_demonstrated=40, num_held_out=60, num_ood=50)
FOUR_TERMS = dataclasses.replace(
    CONFIG, min_terms=4, max_terms=4, ood_min_terms=5, ood_max_terms=6, max_operand=99
)


def operands(prompt):
    return [int(term) for term in prompt.split("+")]


def solve(prompt, demonstration):
    """Follows the demonstration step by step, checks each, and returns its answer."""
    thinking, answer = demonstration.removeprefix("<think>").split("</think>")
    first, *rest = operands(prompt)
    for term, total in zip(rest, map(int, thinking.split(" ")), strict=True):
        first += term
        assert total == first
    assert int(answer) == first
    return answer


def test_the_demonstration_is_spelled_as_documented():
    assert make_demonstration((7, 5, 9, 4)) == "<think>12 21 25</think>25"


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
        assert int(example.answer) == sum(operands(example.prompt))
        for demonstration in example.demonstrations:
            assert solve(example.prompt, demonstration) == example.answer


def test_only_the_first_training_prompts_are_demonstrated():
    sets = make_sets(CONFIG)
    assert [len(x.demonstrations) for x in sets.train] == [1] * 40 + [0] * 260
    assert not any(x.demonstrations for x in (*sets.held_out, *sets.ood))


def test_sets_have_their_sizes_ranges_and_no_problem_twice():
    config = dataclasses.replace(
        CONFIG, min_terms=2, max_terms=4, ood_min_terms=5, ood_max_terms=6, num_held_out=100
    )
    sets = make_sets(config)
    prompts = [x.prompt for x in (*sets.train, *sets.held_out, *sets.ood)]
    assert len(set(prompts)) == len(prompts) == 300 + 100 + 50
    for examples, counts in (
        (sets.train, {2, 3, 4}),
        (sets.held_out, {2, 3, 4}),
        (sets.ood, {5, 6}),
    ):
        terms = [operands(x.prompt) for x in examples]
        assert {len(t) for t in terms} == counts
        assert {x for t in terms for x in t} == set(range(1, 10))


def test_golden_problems():
    """If this moves, every recorded result on this family is of other data: say so in the notes."""
    sets = make_sets(ArithmeticConfig())
    first = [examples[0].prompt for examples in (sets.train, sets.held_out, sets.ood)]
    assert first == ["6+4+9+2+2+8", "1+1+5+8+3", "2+3+9+9+1+8+9"]


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
    """3 ** 4 = 81 problems; training and held-out ones are all of them."""
    config = dataclasses.replace(FOUR_TERMS, max_operand=3, num_demonstrated=0, num_held_out=0)
    with pytest.raises(UsageError, match=r"num_train asks for 300 .* only 75 distinct train"):
        make_sets(config)
    sets = make_sets(dataclasses.replace(config, num_train=75, num_held_out=6))
    assert len({x.prompt for x in (*sets.train, *sets.held_out)}) == 81


@pytest.mark.parametrize(
    "change, message",
    [
        ({"min_terms": 1}, "2 <= min_terms <= max_terms, got 1 and 4"),
        ({"min_terms": 5}, "2 <= min_terms <= max_terms, got 5 and 4"),
        ({"ood_min_terms": 4}, "max_terms < ood_min_terms <= ood_max_terms, got 4, 4 and 6"),
        ({"ood_max_terms": 4}, "got 4, 5 and 4"),
        ({"max_operand": 0}, "max_operand is at least 1, got 0"),
        ({"num_ood": -1}, "num_ood is at least 0, got -1"),
        ({"num_demonstrated": 301}, "between 0 and num_train = 300, got 301"),
        ({"num_demonstrated": -1}, "between 0 and num_train = 300, got -1"),
    ],
)
def test_impossible_settings(change, message):
    with pytest.raises(UsageError, match=message):
        make_sets(dataclasses.replace(FOUR_TERMS, **change))


def test_twenty_thousand_problems_take_well_under_a_second():
    start = time.process_time()
    make_sets(ArithmeticConfig(num_train=20_000))
    assert time.process_time() - start < 1.0
