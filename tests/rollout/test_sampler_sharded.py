"""On meshes of eight devices the sampler gives what it gives on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_sampling.py")
ROOT = Path(__file__).parents[2]
# Nearly all of the time would go to compiling.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
CASES = (
    "fsdp to tensor 2",
    "rows over 8",
    "tensor as trained",
    "rows that grow",
    "made outside of the mesh",
    "mesh passed",
    "greedy",
    "truncated",
    "context to rows over 8",
    "kv heads do not divide",
    "one replica",
)
# How often keys and values are held: where the two kv heads do not divide, by all of `tensor`.
COPIES = {"kv heads do not divide": 4, "one replica": 8}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *CASES],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_every_mesh_equals_single_device(results, case):
    """Shared prompts, refills, forced tokens; trained in another layout than decoded."""
    result = results[case]
    assert result["completions"] == 22
    assert result["tokens"] == 0 and result["floats"] < 1e-5, result
    assert result["capacities"][:2] == [0, 32]
    assert result["compiled again"] == 0
    assert result["copies"] == COPIES.get(case, 1)
    assert result["devices"] == [1 if case == "made outside of the mesh" else 8]
    # The new tokens' queries and partial sums, 8 x 32 at most; a device's share of a layer's keys
    # is 512 at least, a parameter's share is as large.
    assert result["exchanged"] <= 256
    assert result["widest parameters exchanged"] <= 16  # the scale of a norm; matrices are rounded
