"""The arrays that an optimizer keeps beside parameters: which parameter's, where, in what dtype.

In a state they stand in trees shaped as the parameters, under the names of these: whatever else a
state holds, counts above all, does not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey
from jaxtyping import Array

from srft_jax.config import ModelConfig
from srft_jax.mesh import sharding
from srft_jax.models import families
from srft_jax.models.decoder import Params
from srft_jax.ops.rounding import rounded_by_chance


class _Stored(NamedTuple):
    step: Array  # for the draws of the rounding
    state: Any


def stored_as(
    dtype: str, transformation: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The transformation, its moments held in `dtype` between updates and float32 within one.

    To bfloat16 they are rounded by chance: nearest rounding would stop a slow average for good, as
    a hundredth of the last digit is never enough to move it.
    """
    if dtype == "float32":
        return transformation

    def init(params: Params) -> _Stored:
        state = transformation.init(params)
        step = jnp.zeros((), jnp.int32)
        return _Stored(step, _map_moments(lambda path, x: x.astype(dtype), state))

    def update(gradient: Params, stored: _Stored, params: Params) -> tuple[Params, _Stored]:
        state = _map_moments(lambda path, x: x.astype(jnp.float32), stored.state)
        updates, state = transformation.update(gradient, state, params)
        key = jax.random.fold_in(jax.random.key(0), stored.step)
        numbers = {path: n for n, (path, _) in enumerate(jax.tree.leaves_with_path(state))}

        def rounded(path: tuple[Any, ...], x: Array) -> Array:
            return rounded_by_chance(x, jax.random.fold_in(key, numbers[path]))

        return updates, _Stored(stored.step + 1, _map_moments(rounded, state))

    return optax.GradientTransformation(init, update)


def _map_moments(function: Any, state: Any) -> Any:
    """function(path, moment) in place of each moment; all else stays."""
    return jax.tree.map_with_path(
        lambda path, x: function(path, x) if _parameter_of(path) else x, state
    )


def _parameter_of(path: tuple[Any, ...]) -> str:
    """In: the path .inner_states['muon'].mu['layers']['query'].  Out: "layers/query"."""
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, DictKey):
            break
        names.insert(0, str(key.key))
    return "/".join(names)


def moment_shardings(mesh: Mesh, config: ModelConfig, state: Any) -> Any:
    """Where each leaf of an optimizer's state lies: a moment as its parameter, as far as it has its
    axes; all else on every device.

    Args:
        mesh: Devices.
        config: Architecture.
        state: Shapes of the state.
    """
    rows = {row.path: row for row in families.parameters(config)}
    counted = families.counting_heads(config)

    def of_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        row = rows.get(_parameter_of(path))
        if row is None:
            return NamedSharding(mesh, PartitionSpec())
        left = _axes_left(families.stacked_shape(row, config), leaf.shape)
        sizes = families.stacked_shape(row, counted)
        return sharding(mesh, [row.stacked_axes[i] for i in left], [sizes[i] for i in left])

    return jax.tree.map_with_path(of_leaf, state)


def _axes_left(whole: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Which of its parameter's axes a moment of this shape has: all, all but the one that it is a
    mean over, or none.

    In: (28, 3584, 18944), (28, 3584).  Out: [0, 1].
    """
    axes = list(range(len(whole)))
    without_one = [axes[:i] + axes[i + 1 :] for i in reversed(axes)]
    for left in (axes, *without_one):
        if tuple(whole[i] for i in left) == shape:
            return left
    return []
