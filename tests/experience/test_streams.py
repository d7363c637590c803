"""What a run takes from its data: which changes a resumed run or another process would notice."""

import dataclasses

import pytest
from made_groups import setup_of, streams_of

from srft_jax.config import UsageError
from srft_jax.experience.streams import check_same_everywhere, digests


def test_rows_may_move_but_not_change(tmp_path):
    setup = setup_of(tmp_path, "srft")
    state = streams_of(setup).state()

    def with_first(**changes):
        first, *others = setup.data.train
        text = dataclasses.replace(first.example, **changes)
        train = (dataclasses.replace(first, example=text), *others)
        return streams_of(
            dataclasses.replace(setup, data=dataclasses.replace(setup.data, train=train))
        )

    with_first(where="elsewhere.jsonl, row 1").restore(state, "runs/x")
    for changes in ({"answer": "10"}, {"demonstrations": ("other",)}, {"kind": "exact"}):
        with pytest.raises(UsageError, match="the training set is not the one that runs/x was"):
            with_first(**changes).restore(state, "runs/x")


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_a_set_that_another_process_reads_otherwise_is_named(name, tmp_path):
    here = digests(setup_of(tmp_path, "srft").data.texts)
    check_same_everywhere([here, here])
    with pytest.raises(UsageError, match=f"process 1 reads other rows .* in the sets {name}$"):
        check_same_everywhere([here, here | {name: "other"}])
