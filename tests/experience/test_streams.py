"""What a run takes from its data: which changes a resumed run or another process would notice."""

import dataclasses

import pytest
from made_groups import setup_of

from srft_jax.config import UsageError
from srft_jax.experience import streams
from srft_jax.experience.streams import Streams


def test_rows_may_move_but_not_change(tmp_path):
    setup = setup_of(tmp_path, "srft")
    state = Streams(setup).state()

    def with_first(**changes):
        first, *others = setup.sets.train
        train = (dataclasses.replace(first, **changes), *others)
        return Streams(
            dataclasses.replace(setup, sets=dataclasses.replace(setup.sets, train=train))
        )

    with_first(where="elsewhere.jsonl, row 1").restore(state, "runs/x")
    for changes in ({"answer": "10"}, {"demonstrations": ("other",)}, {"kind": "exact"}):
        with pytest.raises(UsageError, match="the training set is not the one that runs/x was"):
            with_first(**changes).restore(state, "runs/x")


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_a_set_that_another_process_reads_otherwise_is_named(name, tmp_path, monkeypatch):
    setup = setup_of(tmp_path, "srft")
    monkeypatch.setattr(streams, "gathered", lambda value: [value, value])
    Streams(setup)
    monkeypatch.setattr(streams, "gathered", lambda value: [value, value | {name: "other"}])
    with pytest.raises(UsageError, match=f"process 1 reads other rows .* in the sets {name}$"):
        Streams(setup)
