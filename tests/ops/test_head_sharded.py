"""On meshes of eight devices the head gives what it gives on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_head.py")
# Nearly all of the time would go to compiling.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_sharded_equals_single_device(results):
    """Loss, statistics of policy and reference, gradients; single sweep and two, both layouts."""
    differences = {name: value for name, value in results.items() if name[0].isdigit()}
    assert len(differences) == 15
    assert max(differences.values()) < 1e-5, differences


def test_only_row_sums_are_exchanged_for_each_row_tile(results):
    """The gradient of the head, as large as the head, is summed once, after the last row tile."""
    assert 0 < results["exchanged in loops"] <= 48 // 4
