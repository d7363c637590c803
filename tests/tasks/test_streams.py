"""What a run takes from its training set: which changes of it a resumed run would notice."""

import dataclasses

import pytest
from made_groups import setup_of

from srft_jax.config import UsageError
from srft_jax.tasks.streams import Streams


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
