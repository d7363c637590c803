"""What libtpu writes, in snippets of real programs, and what they cost by hand.

golden/libtpu_VERSION/ has the snippets, whose first lines say where they are from.
"""

import importlib.metadata
from pathlib import Path

import pytest

from srft_jax.planning.hlo.count import count_module
from srft_jax.planning.hlo.parser import parse_hlo

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("libtpu_*"))

WHAT_TO_DO = """
If planning/hlo has changed: the figures are computed by hand in tests/planning/test_golden_hlo.py;
check them against the snippet before you change either.
If libtpu has changed: compile the same functions with the new version, cut the same instructions
out with tests/planning/golden/cut.py into tests/planning/golden/libtpu_VERSION/, and compare the
texts. Where a spelling is new, teach planning/hlo to read it; keep the old folder while setup.cfg
allows a jax whose libtpu writes it."""

TILES = 18 * 19 // 2  # of 512 x 512, on and below the diagonal of 9,216 x 9,216
HEAD_TILE = 2 * 512 * 128  # bytes of a tile of one head, in bfloat16
QUERIES, KEYS = 2 * 28 * 9216 * 128, 2 * 4 * 9216 * 128

# Snippet -> devices, FLOPs, bytes in HBM, bytes sent by kind and group. The bytes of scalars are
# left out: a program reads a few hundred of them.
COSTS = {
    # A product beside which a gather goes on, [9216, 3584] x [3584, 3584]. Written: the gathered
    # parameters, where the gather starts, and the product; read: both operands.
    "async_all_gather": (
        64,
        2 * 9216 * 3584 * 3584,
        2 * 3584 * 18944 + 2 * 9216 * 3584 + 2 * 3584 * 3584 + 2 * 9216 * 3584,
        {("all-gather", tuple(range(64))): 63 * 2 * 56 * 18944},
    ),
    # [2048, 1024] x [1024, 4096], both operands read; the sum stays in fast memory; a device's 256
    # rows of it are written as float32.
    "reduce_scatter": (
        8,
        2 * 2048 * 1024 * 4096,
        2 * 1024 * 2048 + 2 * 1024 * 4096 + 4 * 256 * 4096,
        {("reduce-scatter", tuple(range(8))): 2 * 2048 * 4096 * 7 / 8},
    ),
    # Six layers [1024, 2048] x [2048, 2048], of each of which a device reads its eighth. The input
    # is read once and the output written once.
    "scan": (
        8,
        6 * 2 * 1024 * 2048 * 2048,
        6 * 2 * 256 * 2048 + 2 * 2 * 1024 * 2048,
        {("all-gather", tuple(range(8))): 6 * 7 * 2 * 256 * 2048},
    ),
    # Two products: queries and keys, scores and values. Queries are read once; for each head and
    # tile of scores, a tile of keys and one of values is read again.
    "splash_forward": (
        64,
        2 * 2 * 28 * TILES * 512 * 512 * 128,
        QUERIES + 28 * TILES * 2 * HEAD_TILE + (QUERIES + 4 * 28 * 9216 * 128 + 3 * 4 * 512 * 128),
        {},
    ),
    # Four products: scores, their gradient, and the gradients of keys and values, both written.
    "splash_backward_keys": (
        16,
        4 * 2 * 28 * TILES * 512 * 512 * 128,
        QUERIES + 28 * TILES * 2 * HEAD_TILE + (2 * KEYS + 2 * 4 * 512 * 128),
        {},
    ),
    # One layer of 28 is written into the cache, from fast memory.
    "update_in_place": (64, 0, 2 * 8 * 1024 * 128, {}),
    # [4096, 3584] x [3584, 18944] in 32 pieces of 112 rows, which go around in both directions. The
    # body does four pieces, so it runs 8 times; it writes two products, adds both to the result,
    # and sends four pieces.
    "windowed_loop": (
        32,
        2 * 4096 * 3584 * 18944,
        8 * 4 * 2 * 4096 * 18944,
        {
            ("collective-permute", (0, 31)): 16 * 2 * 112 * 18944,
            ("collective-permute", (0, 1)): 16 * 2 * 112 * 18944,
        },
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_every_snippet(version):
    assert {path.stem for path in (GOLDEN / version).glob("*.txt")} == set(COSTS), WHAT_TO_DO


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_snippet_costs_what_it_does_by_hand(version, name):
    num_devices, flops, hbm_bytes, sent = COSTS[name]
    module = parse_hlo((GOLDEN / version / f"{name}.txt").read_text())

    def unknown(op_name):
        raise AssertionError(f"the range of {op_name} is in the program" + WHAT_TO_DO)

    count = count_module(module, unknown, num_devices)
    assert count.flops == flops, WHAT_TO_DO
    assert count.collectives == sent, WHAT_TO_DO
    assert hbm_bytes <= count.hbm_bytes <= hbm_bytes + 1000, WHAT_TO_DO


def test_the_installed_libtpu_has_snippets():
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("libtpu is not installed here; .ci/run installs it")
    # The last number of 0.0.42.1 is a patch.
    assert f"libtpu_{'.'.join(version.split('.')[:3])}" in VERSIONS, WHAT_TO_DO
