"""Every parameter of every family is split as far as a mesh allows, at sizes of public models.

Nothing is allocated: shapes and abstract meshes do.
"""

import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh
from public_configs import PUBLIC

from srft_jax.config import LoraConfig, OptimizerConfig
from srft_jax.mesh import AXES, RULES, spec
from srft_jax.models import families, lora
from srft_jax.models.hf_config import read_config
from srft_jax.rollout.cache import CacheShape, empty_cache, shard_axes
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state, state_shardings

MESHES = {
    "fsdp 64": (1, 64, 1, 1),
    "tensor 4": (2, 8, 1, 4),
    "tensor 8": (1, 8, 1, 8),
    "all": (2, 4, 2, 4),
}
LARGE = 2**20  # bytes

# Axes that no mesh axis splits: a head is not cut in two, a scan reads a layer whole, an expert is
# split inside, and ranks of adapters are small.
WHOLE = {"layers", "head", "experts", "rank"}

# What more than one device along an axis holds, above 1 MiB each, and why.
LISTED = {
    # A router has a column for each expert, and every device routes its own rows.
    ("Qwen3-30B-A3B", "router", "tensor"),
    # Fewer kv heads than devices, or heads that do not come out even: none is cut in two.
    *(
        (model, name, "tensor")
        for model in ("Qwen2.5-Math-7B", "Qwen2.5-Math-1.5B")
        for name in ("query", "key", "value", "output")
    ),
    *(("Qwen3-30B-A3B", name, "tensor") for name in ("key", "value")),
    *(("gemma-3-1b-it", name, "tensor") for name in ("query", "key", "value", "output")),
}


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """The architecture of a public model, from its config.json."""

    def read(name):
        directory = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps(PUBLIC[name][1]))
        return read_config(directory)

    return read


def bytes_on_device(where, shape):
    return 4 * math.prod(where.shard_shape(shape))


def unused(mesh, where):
    """Axes of more than one device that a parameter could be split over and is not."""
    used = {
        axis for axes in where.spec if axes for axis in ([axes] if isinstance(axes, str) else axes)
    }
    return {axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1} - used


def held_often(name, config):
    """(parameter, axis) along which devices hold the same more than 1 MiB of it."""
    repeated = set()
    for sizes in MESHES.values():
        mesh = AbstractMesh(sizes, AXES)
        where = families.param_shardings(mesh, config)
        for parameter in families.parameters(config):
            on_shards = where["layers"] if parameter.stacked else where
            on_shards = on_shards[parameter.name]
            shape = families.stacked_shape(parameter, config)
            if bytes_on_device(on_shards, shape) > LARGE:
                repeated |= {(name, parameter.name, axis) for axis in unused(mesh, on_shards)}
    return repeated


def test_the_table_of_rules_knows_every_axis_of_every_family():
    tables = [family.table for family in families.FAMILIES.values()]
    axes = {axis for table in tables for parameter in table for axis in parameter.axes}
    assert axes | {"rank", "layers"} == WHOLE | {"model", "heads", "kv_heads", "mlp", "vocab"}
    assert axes - WHOLE < set(RULES) and not WHOLE & set(RULES)


def test_nothing_large_is_held_twice_without_being_listed(public):
    repeated = set().union(*(held_often(name, public(name)) for name in PUBLIC))
    assert repeated == LISTED


def test_adapters_are_split_as_their_matrix_is(public):
    """A [in, r] and B [r, out], each along the axis that it shares with the matrix [in, out]."""
    config = lora.adapted(public("Qwen3-8B"), LoraConfig())
    where = families.param_shardings(AbstractMesh(MESHES["all"], AXES), config)["layers"]
    assert {tuple(where[name].spec) for name in LoraConfig().targets} == {
        (None, "fsdp", "tensor"),
        (None, "tensor", "fsdp"),
    }
    for name in LoraConfig().targets:
        a, b = (where[factor].spec for factor in families.adapter_names(name))
        assert (a[1], a[2], b[1], b[2]) == (where[name].spec[1], None, None, where[name].spec[2])


@pytest.mark.parametrize("name", PUBLIC)
def test_no_head_is_cut_in_two(public, name):
    config = public(name)
    for sizes in MESHES.values():
        where = families.param_shardings(AbstractMesh(sizes, AXES), config)
        for parameter in families.parameters(config):
            if head_axes := {"heads", "kv_heads"} & set(parameter.axes):
                axis = parameter.stacked_axes.index(head_axes.pop())
                shape = families.stacked_shape(parameter, config)
                shard = where["layers"][parameter.name].shard_shape(shape)
                assert shard[axis] % config.head_dim == 0


def test_moments_lie_where_their_parameters_lie(public):
    config = public("Qwen2.5-Math-7B")
    optimizers = {"policy": make_optimizer(OptimizerConfig(), config, 8)}
    params = families.by_path(
        {
            parameter.path: jax.ShapeDtypeStruct(
                families.stacked_shape(parameter, config), jnp.float32
            )
            for parameter in families.parameters(config)
        }
    )
    on_mesh = {
        name: state_shardings(config, optimizers, AbstractMesh(sizes, AXES))
        for name, sizes in MESHES.items()
    }
    for where in on_mesh.values():  # heads do not split over tensor=8
        adam = where.optimizer_states["policy"]
        assert optax.tree.get(adam, "mu") == optax.tree.get(adam, "nu") == where.params
    shapes = jax.eval_shape(lambda p: new_state(p, optimizers), params)
    total = sum(
        jax.tree.leaves(
            jax.tree.map(lambda x, at: bytes_on_device(at, x.shape), shapes, on_mesh["all"])
        )
    )
    # 7.6e9 parameters, thrice, over fsdp 4 x tensor 4.
    assert total == pytest.approx(3 * 4 * 7_615_616_512 / 16, rel=0.01)


def test_caches_are_split_by_rows_and_kv_heads(public):
    config = public("Qwen3-8B")
    shape = CacheShape(64, 16, 8, 512, 1024, 64)
    cache = jax.eval_shape(lambda: empty_cache(config, shape, "bfloat16"))
    mesh = AbstractMesh((8, 1, 1, 8), AXES)
    for x in jax.tree.leaves(cache):
        if 2 * x.size > LARGE:
            assert tuple(spec(mesh, shard_axes(x), x.shape)) == ("data", "tensor", None, None)
