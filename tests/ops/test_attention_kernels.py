"""Kernels of attention against all scores: long rows by XLA, splash interpreted, cuDNN's by XLA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import HEADS, KV_HEADS, OPTIONS, H, by_mask, problem, with_gradients
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, use_abstract_mesh

from srft_jax.mesh import AXES
from srft_jax.models.decoder import DOTS
from srft_jax.ops import context
from srft_jax.ops.attention import Part, ScoreOptions, packed_attention
from srft_jax.ops.attention_loop import query_tiles
from srft_jax.ops.attention_terms import Extent, TileSizes, make_sight
from srft_jax.ops.mesh_attention import mesh_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 200  # two tiles of splash, the second half empty; 7 x 13 tiles of the loop
SMALL = TileSizes(loop_queries=32, loop_keys=16, cudnn_queries=64, splash=128)
CAPPED = ScoreOptions(0.9, 0.7)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def by_kernel(name):
    """Packed attention in small tiles by a kernel that a CPU can run; `loop` takes all rows."""
    short_keys, kernel = (0, "xla") if name == "loop" else (1024, name)
    tiles = SMALL._replace(short_keys=short_keys)
    return functools.partial(packed_attention, kernel=kernel, tiles=tiles, interpret=True)


def assert_near(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


PLAIN, WINDOW = (OPTIONS, None), (ScoreOptions(0.9), 70)


@pytest.mark.parametrize(
    ("name", "options", "window"),
    [
        ("loop", CAPPED, 70),
        pytest.param("loop", *PLAIN, marks=pytest.mark.slow),
        ("cudnn", *WINDOW),
        pytest.param("cudnn", *PLAIN, marks=pytest.mark.slow),
        ("splash", CAPPED, 70),
        pytest.param("splash", *PLAIN, marks=pytest.mark.slow),
    ],
)
def test_kernels_and_their_gradients_equal_all_scores(name, options, window):
    inputs = problem(LENGTH, mean_segment=80)
    kernel = functools.partial(by_kernel(name), options=options, window=window)
    wanted = functools.partial(by_mask, options=options, window=window)
    got = with_gradients(kernel, *inputs)
    assert_near(got, with_gradients(wanted, *inputs))
    for change in ({"window": 20}, {"options": ScoreOptions(0.5, options.softcap)}):
        assert np.abs(got[0][1] - wanted(*inputs, **change)).max() > 0.1


def others_slow(*names):
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize("name", others_slow("loop", "cudnn", "splash"))
@pytest.mark.parametrize("on", [True, False])
def test_a_window_that_the_device_turns_on(name, on):
    """Some layers of a scan slide, and only the device knows which."""
    query, key, value, segment_ids = problem(LENGTH)
    attend = by_kernel(name)

    @jax.jit
    def traced(slides):
        return attend(query, key, value, segment_ids, OPTIONS, 3, slides=slides)

    wanted, other = (by_mask(query, key, value, segment_ids, window=n) for n in (3, None))
    if not on:
        wanted, other = other, wanted
    got = traced(jnp.bool_(on))
    assert_near(got, wanted)
    assert np.abs(got - other).max() > 0.1


@pytest.mark.parametrize("name", others_slow("loop", "xla", "cudnn", "splash"))
def test_parts_of_rows_together_give_whole_rows(name):
    """Values and gradients by queries are put together, gradients by keys add up."""
    inputs = tuple(map(jnp.asarray, problem(256, mean_segment=120)))
    want = with_gradients(functools.partial(by_mask, window=90), *inputs)
    attend = functools.partial(by_kernel(name), options=OPTIONS, window=90)

    def in_parts(query, key, value, segment_ids):
        slots = context.slots(2, 256)

        def attend_part(number):
            here = jnp.asarray(slots)[number]
            part = Part(slots, number, segment_ids)
            return attend(query[:, here], key, value, segment_ids[:, here], part=part)

        # One program for both, as on a mesh: the number is known on the device alone.
        outs = jax.lax.map(attend_part, jnp.arange(2))
        return jnp.concatenate([*outs], axis=1)[:, np.argsort(slots, axis=None)]

    assert_near(with_gradients(in_parts, *inputs), want)


@pytest.mark.parametrize("window", [None, 1, 70, 100])
def test_a_chunk_has_the_keys_that_it_may_see(window):
    for queries, keys in Extent(window=window).chunks(LENGTH, LENGTH, 64):
        oldest = max(0, queries.start - (window or LENGTH) + 1)
        assert keys.start <= oldest < keys.start + 64
        assert keys.stop == queries.stop


def test_tiles_that_cannot_meet_do_not():
    """All pairs of tiles with something to see are visited, in any order, and few other pairs."""
    segment_ids = np.stack([np.arange(LENGTH) // 60 + 1, np.arange(LENGTH) // 90 + 1])
    for window in (None, 20):
        sight = make_sight(segment_ids, window, None, None)
        tiles = query_tiles(sight, SMALL)
        mask = np.zeros((7 * 32, 13 * 16), bool)
        mask[:LENGTH, :LENGTH] = np.asarray(sight.mask(np.arange(LENGTH))).any(axis=0)
        needed = mask.reshape(7, 32, 13, 16).any(axis=(1, 3))
        visited = np.zeros_like(needed)
        for row, order, number in zip(visited, tiles.order, tiles.num_met, strict=True):
            row[order[:number]] = True
        assert (visited >= needed).all()
        assert visited.sum() <= 1.1 * needed.sum() < 0.7 * np.tril(np.ones((7, 13))).size


def temp_bytes(length):
    """Temporary bytes of the gradient by queries, keys and values, as XLA plans it."""
    shapes = [(1, length, HEADS, 64)] + 2 * [(1, KV_HEADS, length, 64)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(*inputs):
        return packed_attention(*inputs, ScoreOptions(H**-0.5)).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arrays, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    at_8k, at_32k = temp_bytes(8192), temp_bytes(32768)
    assert at_32k < 4.1 * at_8k
    # Everything that is kept for 32k tokens takes less than the scores of one head at 8k.
    assert at_32k < 4 * 8192**2


def kernels_in(jaxpr, read=True):
    """Names of the kernels with a result that is read; XLA leaves out the other ones."""
    for equation in jaxpr.eqns:
        needed = read and any(type(out).__name__ != "DropVar" for out in equation.outvars)
        if equation.primitive.name == "pallas_call" and needed:
            yield re.search("splash_mha_([a-z]+)", str(equation.source_info.name_stack))[1]
        for inner in jaxprs_in_params(equation.params):
            yield from kernels_in(inner, needed)


def test_what_remat_keeps_of_splash():
    """With the names that the decoder keeps, the backward pass runs no forward kernel again."""
    inputs = problem(20)

    def kernels(*kept):
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*kept)
        )
        def attend(query, key, value):
            out = by_kernel("splash")(query, key, value, inputs[3], OPTIONS)
            return jnp.sin(out)

        gradient = jax.grad(lambda *arrays: attend(*arrays).sum(), argnums=(0, 1, 2))
        return sorted(kernels_in(jax.make_jaxpr(gradient)(*inputs[:3]).jaxpr))

    assert kernels() == ["dkv", "dq", "fwd", "fwd"]
    assert kernels(*DOTS) == ["dkv", "dq", "fwd"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(28, 4, 128, None), (4, 1, 256, 512)]
)
def test_splash_is_lowered_for_tpu_in_the_shapes_of_models(heads, kv_heads, head_dim, window):
    """Qwen2.5-7B and gemma-3-1b at 2047 tokens; shapes and tiles are checked without libtpu."""
    shapes = (1, 2047, heads, head_dim), *2 * [(1, kv_heads, 2047, head_dim)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    ids, slides = jax.ShapeDtypeStruct((1, 2047), jnp.int32), jax.ShapeDtypeStruct((), jnp.bool_)

    def total(*inputs):
        *inputs, on = inputs
        out = packed_attention(
            *inputs,
            ScoreOptions(head_dim**-0.5),
            window,
            slides=None if window is None else on,
            kernel="splash",
        )
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*arrays, ids, slides)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    kernels = {
        name: program.count(f'kernel_name = "splash_mha_{name}') for name in ("fwd", "dq", "dkv")
    }
    assert kernels == dict.fromkeys(kernels, 1 if window is None else 2)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 1, 1, 1)])
def test_a_kernel_is_never_left_to_xla_to_partition(shape):
    """XLA refuses to; here neither the row nor the heads can be split."""
    query, key = jnp.zeros((1, 64, 28, 8)), jnp.zeros((1, 4, 64, 8))
    attend = functools.partial(mesh_attention, options=ScoreOptions(1.0), kernel="splash")
    arrays = (query, key, key, jnp.ones((1, 64), jnp.int32))
    with use_abstract_mesh(AbstractMesh(shape, AXES)):
        (equation,) = jax.make_jaxpr(attend)(*arrays).eqns
    assert equation.primitive.name == "shard_map"
