"""On meshes of two to eight devices the train step gives what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from srft_jax.training import metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Nearly all of the time goes to compiling.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run_script(name):
    """Its last line."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, "XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    return run_script("sharded_steps.py")


@pytest.mark.parametrize("mesh", ["8x1x1", "2x2x2", "1x4x2", "1x1x2", "1x1x4", "elementwise 2x2x2"])
def test_sharded_equals_single_device(results, mesh):
    assert results["moved"] > 1e-2  # or equal parameters would mean nothing
    assert max(results[mesh].values()) < 1e-5, results[mesh]


def test_adapters_on_a_mesh_equal_those_on_a_single_device(results):
    found = results["lora"]
    assert found.pop("moved") > 1e-2
    assert max(found.values()) < 1e-5, found


def test_all_metrics_were_compared(results):
    assert set(metrics.METRICS) < set(results["metrics"])


def test_the_head_is_split_over_the_devices(results):
    """Each device has the blocks of its own rows."""
    assert results["head_flops_share"] < 1.1 / 8


def test_every_optimizer_makes_the_updates_of_a_single_device():
    for name, found in run_script("sharded_optimizers.py").items():
        assert found["moved"] > 1e-2
        assert found["difference"] < 1e-5, name
