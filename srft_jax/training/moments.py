"""Moments, the arrays that an optimizer keeps for each parameter: where they lie, in what dtype.

In an optimizer's state they stand in trees that are shaped like the parameters and have their
names. The rest of a state, counts above all, has no such names.
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
from srft_jax.ops.rounding import stochastic_round


class _Stored(NamedTuple):
    step: Array  # updates made, a seed of the stochastic rounding
    state: Any  # the transformation's own state


def stored_as(
    dtype: str, transformation: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Return the transformation, its moments held in `dtype` between updates, float32 within one.

    bfloat16 moments use stochastic rounding: with nearest rounding a slow average would stop for
    good, as a change of a hundredth of its last digit would always be rounded away.
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
        # A number for each leaf, so that no two leaves draw the same random bits.
        numbers = {path: n for n, (path, _) in enumerate(jax.tree.leaves_with_path(state))}

        def rounded(path: tuple[Any, ...], x: Array) -> Array:
            return stochastic_round(x, jax.random.fold_in(key, numbers[path]))

        return updates, _Stored(stored.step + 1, _map_moments(rounded, state))

    return optax.GradientTransformation(init, update)


def _map_moments(function: Any, state: Any) -> Any:
    """Replace each moment of a state by function(path, moment)."""
    return jax.tree.map_with_path(
        lambda path, x: function(path, x) if _parameter_of(path) else x, state
    )


def _parameter_of(path: tuple[Any, ...]) -> str:
    """Path of the parameter that a leaf of a state belongs to, "" for a leaf without one.

    In: the path .inner_states['muon'].mu['layers']['query'].  Out: "layers/query".
    """
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, DictKey):
            break
        names.insert(0, str(key.key))
    return "/".join(names)


def moment_shardings(model_config: ModelConfig, mesh: Mesh, state: Any) -> Any:
    """Return the sharding of each leaf of an optimizer's state. Each moment takes its parameter's
    sharding on the axes that both have; every other leaf is on every device.

    Args:
        model_config: Architecture, with its adapters if any.
        mesh: Devices.
        state: Shapes of the state.
    """
    parameters = {parameter.path: parameter for parameter in families.parameters(model_config)}
    counted = families.counting_heads(model_config)

    def leaf_sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        parameter = parameters.get(_parameter_of(path))
        if parameter is None:
            return NamedSharding(mesh, PartitionSpec())
        kept = _axes_kept(families.stacked_shape(parameter, model_config), leaf.shape)
        sizes = families.stacked_shape(parameter, counted)
        return sharding(
            mesh, [parameter.stacked_axes[axis] for axis in kept], [sizes[axis] for axis in kept]
        )

    return jax.tree.map_with_path(leaf_sharding, state)


def _axes_kept(whole: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Axes of a parameter of shape `whole` that a moment of `shape` has: all of them, all but the
    axis that it is a mean over, or none.

    In: (28, 3584, 18944), (28, 3584).  Out: [0, 1].
    """
    axes = list(range(len(whole)))
    # The last axis is left out first: which one it was is ambiguous in a square matrix.
    means = [axes[:i] + axes[i + 1 :] for i in reversed(axes)]
    for kept in (axes, *means):
        if tuple(whole[axis] for axis in kept) == shape:
            return kept
    return []
