"""Which mesh axes an array's axes are split over."""

import pytest
from jax.sharding import AbstractMesh

from srft_jax.mesh import AXES, spec, split_heads


@pytest.mark.parametrize(
    ("heads", "tensor", "split"),
    [((32, 8), 4, (True, True)), ((32, 8), 16, (True, False)), ((28, 4), 8, (False, False)),
     ((12, 3), 2, (False, False)), ((12, 3), 6, (True, False))],
)  # fmt: skip
def test_attention_is_split_by_whole_heads(heads, tensor, split):
    mesh = AbstractMesh((1, 2, 1, tensor), AXES)
    assert tuple(map(bool, split_heads(mesh, *heads))) == split


def test_rows_are_split_context_first_and_batches_not_by_it():
    mesh = AbstractMesh((2, 4, 2, 1), AXES)
    assert spec(mesh, ("rows", None), (32, 8))[0] == ("context", "data", "fsdp")
    assert spec(mesh, (None, "batch", None), (3, 16, 8))[1] == ("data", "fsdp")
