"""Which mesh axes an array's axes are split over."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from srft_jax.mesh import AXES, by_row_shard, spec, split_heads


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


def test_rows_of_all_arrays_must_divide_or_of_none():
    """Prompts beside completions: other numbers of rows, each divided by the devices."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 1, 1, 1), AXES)):
        add = by_row_shard(lambda rows, prompts: rows + prompts[0])
        shape = jax.eval_shape(add, *(jnp.ones(size) for size in (6, 4)))
        assert shape.shape == (6,)
        with pytest.raises(ValueError, match=r"does not divide all rows of \{3, 4\}"):
            jax.eval_shape(add, *(jnp.ones(size) for size in (4, 3)))
