"""docs/launch.md: its shell, its manifests, and every command in either."""

import math
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml
from tiny_runs import ROOT

from srft_jax.config import parse

PAGE = (ROOT / "docs" / "launch.md").read_text()

# The flags that the page uses, as gcloud's reference lists them for each command.
_ANY = {"--quiet", "--format"}
GCLOUD = {
    "config set": set(),
    "config get": set(),
    "compute tpus tpu-vm create": {"--zone", "--accelerator-type", "--version", "--spot"},
    "compute tpus tpu-vm scp": {"--zone", "--worker", "--recurse"},
    "compute tpus tpu-vm ssh": {"--zone", "--worker", "--command"},
    "compute tpus tpu-vm delete": {"--zone"},
    "compute tpus queued-resources create": {
        *("--zone", "--node-id", "--accelerator-type", "--runtime-version", "--spot")
    },
    "compute tpus queued-resources describe": {"--zone"},
    "compute tpus queued-resources delete": {"--zone", "--force"},
    "container clusters create": {"--location", "--release-channel", "--workload-pool"},
    "container node-pools create": {
        *("--cluster", "--location", "--node-locations", "--machine-type", "--tpu-topology"),
        "--num-nodes",
    },
}
# Flags without which gcloud refuses the command.
NEEDED = {
    "compute tpus tpu-vm create": {"--accelerator-type", "--version"},
    "compute tpus queued-resources create": {
        "--node-id",
        "--accelerator-type",
        "--runtime-version",
    },
    "container node-pools create": {"--cluster", "--machine-type", "--tpu-topology"},
}
# Keys of a SkyPilot task.
SKY = {"name", "workdir", "num_nodes", "resources", "secrets", "setup", "run"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def manifests():
    return [yaml.safe_load(block) for block in blocks("yaml")]


def strings(tree):
    """All texts in a manifest."""
    if isinstance(tree, str):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from strings(item)


SCRIPTS = blocks("bash") + [
    text for manifest in manifests() for text in strings(manifest) if "\n" in text
]
# Scripts that run on the hosts of a TPU.
REMOTE = [text for _, text in re.findall(r"--command=(['\"])(.*?)\1(?=\n)", PAGE, re.DOTALL)]


@pytest.mark.parametrize("script", [*SCRIPTS, *REMOTE])
def test_shell_is_shell(script):
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def runs():
    """Arguments of run.py wherever the page starts it, shell variables and substitutions as 1."""
    text = re.sub(r'"?\$\(echo .*?head -n1\)(:8476)"?', r"host\1", "\n".join(SCRIPTS))
    text = re.sub(r'"\$[A-Z_]+"', "1", re.sub(r"\\\n", " ", text))
    return [
        shlex.split(line) for line in re.findall(r"python run\.py ((?:[^\n>\"']|(?<==)')*)", text)
    ]


def test_the_page_starts_runs_everywhere():
    assert len(REMOTE) == 4
    assert len(runs()) == 6  # plan, TPU VMs, SLURM, SkyPilot twice, GKE


@pytest.mark.parametrize("arguments", runs(), ids=lambda arguments: arguments[-1])
def test_its_runs_parse(arguments, monkeypatch):
    """Files exist, keys are keys; a run of all hosts writes to one place."""
    monkeypatch.chdir(ROOT)
    verb, config = parse(arguments)
    assert pathlib.Path(config.model.path).name == "Qwen2.5-Math-7B"
    if verb == "train":
        assert config.data.evaluation and config.data.train
        ways = config.mesh.data * config.mesh.fsdp
        assert config.training.rows_per_microbatch % ways == 0


def test_gcloud_knows_its_flags():
    used = set()
    for block in blocks("bash"):
        for line in re.sub(r"\\\n", " ", f"\n{block}").split("\ngcloud ")[1:]:
            command = next(name for name in GCLOUD if line.startswith(name + " "))
            line = re.sub(r"--command=(['\"]).*?\1(?=\s|$)", "--command=x", line, flags=re.DOTALL)
            flags = set(re.findall(r"(?<=\s)--[a-z-]+", line.split("\n")[0]))
            assert flags <= GCLOUD[command] | _ANY, command
            assert flags >= NEEDED.get(command, set()), command
            used.add(command)
    assert used >= GCLOUD.keys() - {"config get"}


def test_the_sbatch_script_asks_for_what_it_uses():
    (script,) = [block for block in blocks("bash") if "#SBATCH" in block]
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))
    assert script.startswith("#!/bin/bash\n#SBATCH")
    # JAX gives a process of SLURM the GPU of its own number.
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["nodes"] == "1" and "time" in asked and "srun" in script


def test_skypilot_tasks():
    tasks = [manifest for manifest in manifests() if "apiVersion" not in manifest]
    assert len(tasks) == 2
    for task in tasks:
        assert task.keys() <= SKY and task.keys() >= {"resources", "setup", "run"}
        assert re.fullmatch(r"tpu-v5p-32|H100:8", task["resources"]["accelerators"])


def test_the_jobset_has_a_pod_for_each_host():
    (jobset,) = [m for m in manifests() if m.get("kind") == "JobSet"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == chips // per_host == 4
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert pod["restartPolicy"] == "Never" and container["image"] and container["command"]


def test_its_table_names_all_tpus():
    files = {path.name for path in (ROOT / "configs" / "hardware").iterdir()}
    assert set(re.findall(r"^\| `configs/hardware/(.*?)`", PAGE, re.MULTILINE)) == files - {
        "8x80gb_gpu.yaml"
    }
