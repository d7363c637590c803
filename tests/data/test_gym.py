"""Sources of reasoning-gym: by a toy in its place, and slowly by what it has."""

import dataclasses
import random
import sys
import types

import pytest

from srft_jax.config import UsageError
from srft_jax.config.data import GymConfig
from srft_jax.data import gym
from srft_jax.data.held_out import is_held_out
from srft_jax.rewards.verifiers import load_verifier


@dataclasses.dataclass
class ToyOptions:
    seed: int
    size: int
    most: int = 100_000
    letters: str = "abc"

    def validate(self):
        assert self.most > 0, "most must be positive"


class Toy:
    """As generators are: item i of seed s is item 0 of seed s + i."""

    def __init__(self, config):
        config.validate()
        self.config = config

    def __getitem__(self, index):
        number = random.Random(self.config.seed + index).randrange(self.config.most)
        answer = {0: None, 1: "", 2: "2" * 513}.get(number, str(number))
        return {"question": f"What is {number}?", "answer": answer, "metadata": {"at": (1, {2})}}


@pytest.fixture
def toy(monkeypatch):
    factory = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = dict.fromkeys(("toy", "tidy", "word_ladder"), (Toy, ToyOptions))
    factory.create_dataset = lambda name, **options: Toy(ToyOptions(**options))
    package = types.ModuleType("reasoning_gym")
    package.factory = factory
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def load(set_name="train", count=100, dataset="toy", **changes):
    return gym.load_gym(GymConfig(dataset, count=count, **changes), set_name)


def prompts(examples):
    return [example.prompt for example in examples]


def test_without_the_extra_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match=r"pip install 'srft_jax\[gym\]'"):
        load()


def test_sets_are_distinct_and_split_by_content(toy):
    train = prompts(load(count=1000) + load(count=1000, seed=1))
    held_out = prompts(load("held_out", count=300))
    assert len(set(train)) > 1900 and len(set(held_out)) == 300
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))


def test_a_larger_set_starts_with_the_smaller_one(toy):
    assert load(count=2000)[:100] == load(count=100)


def test_metadata_are_json_values(toy):
    assert load(count=1)[0].metadata == {"at": [1, "{2}"]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "gym.count is at least 1, got 0"),
        ({"options": {"mst": 3}}, "gym.options of toy: there is no 'mst'; did you mean most?"),
        ({"options": {"size": 3}}, "there is no 'size'; it is letters, most"),
        ({"options": {"most": 0}}, "toy fails with seed 0 .*AssertionError: most must be positive"),
        ({"options": {"most": "3"}}, "toy fails with seed 0 and options {'most': '3'}: TypeError"),
        ({"options": {"most": 1}}, "gym.dataset toy gives no answers"),
    ],
)
def test_mistakes(toy, change, message):
    with pytest.raises(UsageError, match=message):
        load(**change)


def test_an_unknown_generator(toy):
    with pytest.raises(UsageError, match="there is no 'tody'; did you mean toy or tidy?"):
        gym.load_gym(GymConfig("tody"), "train")


def test_generators_that_differ_between_processes_need_a_hash_seed(toy, monkeypatch):
    for value in (None, "random"):
        if value is None:
            monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        else:
            monkeypatch.setenv("PYTHONHASHSEED", value)
        with pytest.raises(UsageError, match="word_ladder gives other problems .*HASHSEED=0"):
            load(dataset="word_ladder")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(load(dataset="word_ladder")) == 100


def test_too_few_problems_are_told_with_the_numbers(toy, monkeypatch):
    """The numbers 0 to 2 have no answer that can be verified; 37 of those below 40 do."""
    monkeypatch.setattr(Toy, "__getitem__", without_none(Toy.__getitem__))
    counts = {}
    for set_name, side in (("train", "training"), ("held_out", "held-out")):
        message = rf"count asks for 64 problems, but 2048 draws .* only (\d+) distinct {side} ones"
        with pytest.raises(UsageError, match=message) as error:
            load(set_name, count=64, options={"most": 40})
        counts[side] = int(str(error.value).split("give only ")[1].split()[0])
    assert sum(counts.values()) == 37 and all(counts.values())


def without_none(get_item):
    def item(self, index):
        entry = get_item(self, index)
        return {**entry, "answer": entry["answer"] or ""}

    return item


@pytest.mark.slow
def test_gsm_symbolic_comes_with_its_worked_answers():
    train = gym.load_gym(GymConfig("gsm_symbolic", count=300), "train")
    held_out = gym.load_gym(GymConfig("gsm_symbolic", count=50), "held_out")
    assert not set(prompts(train)) & set(prompts(held_out))
    assert not any(x.demonstrations for x in held_out)
    for example in train:
        (demonstration,) = example.demonstrations
        verify = load_verifier(example.kind)
        assert verify(demonstration, example.answer, example.metadata).verdict == "right"
        assert "####" not in demonstration and len(demonstration) > 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "dataset", ["acre", "base_conversion", "caesar_cipher", "countdown", "gcd", "leg_counting"]
)
def test_generators_give_the_same_problems_again_and_their_answers_are_right(dataset):
    small, large = (gym.load_gym(GymConfig(dataset, count=n), "train") for n in (20, 40))
    assert large[:20] == small
    for example in small:
        verify = load_verifier(example.kind)
        completion = f"<think></think>\n{example.answer}"
        assert verify(completion, example.answer, example.metadata).verdict == "right"


@pytest.mark.slow
def test_countdown_is_scored_by_our_own_verifier():
    (example, *_) = gym.load_gym(GymConfig("countdown", count=1), "train")
    verify = load_verifier(example.kind)
    answer = f"<think></think>({example.answer})"
    assert verify(answer, example.answer, example.metadata).verdict == "right"
    assert verify(answer + "+1-1", example.answer, example.metadata).verdict == "wrong"


@pytest.mark.slow
def test_a_real_mistake_in_an_option_is_told():
    with pytest.raises(UsageError, match="did you mean min_numbers or max_numbers"):
        gym.load_gym(GymConfig("countdown", options={"numbers": 3}), "train")
    with pytest.raises(UsageError, match="graph_color gives no answers"):
        gym.load_gym(GymConfig("graph_color"), "train")
