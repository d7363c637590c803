"""On meshes of two to eight devices the train step gives what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from srft_jax.training import metrics

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("sharded_steps.py")
ROOT = Path(__file__).parents[2]
# Nearly all of the time would go to compiling.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# Sizes of data, fsdp, context and tensor. The two kv heads do not split over tensor=4, nor do the
# four query heads over tensor=8.
MESHES = [
    "8x1x1x1",
    "1x8x1x1",
    "1x1x8x1",
    "1x1x1x8",
    "1x1x1x4",
    "2x2x1x2",
    "2x2x2x1",
    "1x1x2x4",
    "1x2x2x2",
]
HEAD = "head:4x1x2x1"
OTHERS = [f"{case}:1x2x2x2" for case in ("elementwise", "lora", "passes")]


def run(*cases, script=SCRIPT):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), *cases],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    return run(*MESHES, *OTHERS, HEAD)


def check(differences):
    assert differences.pop("moved") > 1e-2  # or equal parameters would mean nothing
    assert max(differences.values()) < 1e-5, differences


def test_a_checkpoint_is_restored_onto_another_mesh_bit_for_bit():
    """From fsdp=8 onto data=2, context=2, tensor=2."""
    check(run("restore:2x1x2x2")["restore:2x1x2x2"])


@pytest.mark.parametrize("case", [*MESHES, *OTHERS])
def test_every_mesh_equals_a_single_device(results, case):
    check(dict(results[case]))


def test_all_metrics_were_compared(results):
    assert set(metrics.METRICS) < set(results["1x2x2x2"])


def test_the_head_is_split_over_the_devices(results):
    """Each device has the blocks of its own rows."""
    assert results[HEAD] < 1.1 / 8


def test_every_optimizer_makes_the_updates_of_a_single_device():
    for name, differences in run(script=SCRIPT.with_name("sharded_optimizers.py")).items():
        assert differences["moved"] > 1e-2
        assert differences["difference"] < 1e-5, name
