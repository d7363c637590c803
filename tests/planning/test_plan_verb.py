"""The verb `plan` as a user starts it, and what it prints."""

import dataclasses
import importlib.metadata
import itertools
import json

import jax
import pytest
from tiny_runs import ROOT, tiny_arguments

from srft_jax.config import UsageError, parse
from srft_jax.planning.chips import CHIPS
from srft_jax.planning.plan_text import format_plan
from srft_jax.planning.planning_tools import PlanningTools
from srft_jax.planning.plans import Plan, add_rollouts, compile_plan
from srft_jax.planning.program_costs import (
    OutOfMemory,
    bytes_needed,
    program_cost,
    trips_by_scope,
)
from srft_jax.planning.topology import Topology, parse_topology, seconds_to_send
from srft_jax.planning.workload import make_workload
from srft_jax.setup.plan_checks import outline_for_plan
from srft_jax.tasks.plan import plan
from srft_jax.tasks.planned import planned

ARCHITECTURE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
NUM_PARAMETERS = (
    2 * 2048 * 512
    + 512
    + 4 * (512 * (512 + 2 * 256) + 512 + 2 * 256 + 512 * 512 + 3 * 512 * 1024 + 2 * 512)
)
NUM_BIASES = 4 * (512 + 2 * 256)  # which fsdp does not split


@pytest.fixture
def arguments(tmp_path):
    """Flags of a run whose model, tokenizer and data do not exist."""
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE))
    return [
        f"--config={ROOT / 'tests' / 'tiny.yaml'}",
        "--model.architecture=null",
        "--model.tokenizer=/nowhere",
        "--model.path=nobody/model",
        "--data.train=null",
        f"--plan.architecture={tmp_path}",
        f"--run_dir={tmp_path / 'run'}",
    ]


def last_line(out):
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_plan_on_fake_devices(arguments, command, tmp_path):
    """Supervised training, which has no rollouts to compile."""
    flags = ("--objective.preset=sft", "--mesh.fsdp=2", "--topology", "cpu:8", "--json")
    code, out, err = command("plan", *arguments, *flags, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert code == 0, err
    figures = last_line(out)
    assert f"{NUM_PARAMETERS:,}" in out and "fits: yes" in out and figures["fits"]
    held = figures["hbm_by_purpose"]["updates"]
    assert held["parameters"] == held["gradients"] == 4 * (NUM_PARAMETERS + NUM_BIASES) / 2
    assert held["optimizer"] == 2 * held["parameters"] + 8  # two moments, two counters
    assert sum(held.values()) == pytest.approx(figures["hbm_bytes_per_device"])
    # Gradients are summed over devices with other rows, a quarter of which holds each shard.
    sent = figures["collective_bytes"]["train"]
    assert sum(sent.values()) > 2 * 4 * NUM_PARAMETERS * 7 / 8
    assert figures["flops_per_device"]["train"] >= figures["model_flops_per_device"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_plan_of_rollouts_and_updates(arguments, command):
    """Every program of a step; scaled, as many FLOPs a device; found again by a search."""
    flags = ("--topology=cpu:4", "--json", "--search")
    code, out, err = command("plan", *arguments, *flags, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert code == 0, err
    figures = last_line(out)
    assert list(figures["flops_per_device"]) == [
        *("convert_layer", "convert_rest", "prefill", "decode", "train")
    ]
    rollouts = figures["hbm_by_purpose"]["rollouts"]
    assert rollouts["KV cache"] > 0 and rollouts["parameters"] > 0
    assert "found by --search" in out and figures["step_seconds"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_what_rollouts_hold_is_what_xla_says_of_decode(arguments):
    """The sampler's parameters and cache are its arguments, but for a few numbers a row."""
    config = parse(["plan", *arguments, "--plan.topology=cpu:1"])[1]
    topology = Topology("cpu:1", CHIPS["cpu"], (1,), tuple(jax.devices()[:1]))
    run = planned(outline_for_plan(config, topology.devices))
    compiled = compile_plan(run, topology, PlanningTools(log=print))
    (decode,) = (program for program in compiled.compiled if program.name == "decode")
    held = compiled.memory["rollouts"]
    ours = held["sampler's parameters"] + held["KV cache"]
    assert ours == pytest.approx(decode.arguments, rel=0.02)


@pytest.mark.slow
def test_plan_for_tpus(arguments, command):
    """libtpu compiles for what is not there, kernels included; .ci/run installs it."""
    assert importlib.metadata.version("libtpu")
    flags = ("--topology=v5e:2x2", "--json", "--mesh.fsdp=2", "--model.dtype=bfloat16")
    code, out, err = command("plan", *arguments, *flags, JAX_PLATFORMS="cpu")
    assert code == 0, err
    figures = last_line(out)
    assert figures["fits"] and figures["hbm_bytes_of_device"] == 15.75 * 2**30
    assert figures["flops_per_device"]["train"] >= figures["model_flops_per_device"]
    assert all(line.startswith("compiling ") for line in err.splitlines()), err
    code, out, err = command("plan", *arguments, *flags, "--training.rows_per_microbatch=262144")
    assert code == 0 and "fits: no" in out and not last_line(out)["fits"], err


@pytest.mark.slow
def test_plan_for_two_slices(arguments, command):
    """Each device sums its quarter of the float32 gradients with its like, and little else."""
    flags = ("--objective.preset=sft", "--mesh.fsdp=4", "--mesh.slices=2")
    code, out, err = command(
        "plan", *arguments, *flags, "--topology=v5e:2x2", "--json", JAX_PLATFORMS="cpu"
    )
    assert code == 0 and "plan for 2 x v5e:2x2" in out, err
    crossed = last_line(out)["bytes_to_other_slices"]["train"]
    assert NUM_PARAMETERS <= crossed <= 1.5 * NUM_PARAMETERS


@pytest.mark.slow
def test_gpus_are_planned_by_arithmetic(arguments, command):
    code, out, err = command("plan", *arguments, "--topology=h100:8", "--json")
    assert code == 0, err
    assert "by arithmetic alone" in out and not last_line(out)["counted"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "plan needs plan.topology"),
        (("--topology=v5p",), "is not of the form v5p:4x4x4"),
        (("--topology=v9:2x2",), "with one of v4, v5e"),
        (("--topology=h100:8", "--mesh.slices=2"), "several slices can be planned for TPUs only"),
    ],
)
def test_what_cannot_be_planned(flags, message, arguments):
    config = parse(["plan", *arguments, *flags])[1]
    with pytest.raises(UsageError, match=message):
        plan(config, PlanningTools(prepare_backend=parse_topology))  # the tests' own devices stay


def test_a_missing_architecture_names_the_key(tmp_path):
    config = parse(tiny_arguments(tmp_path, "--model.architecture=null", "--model.path=no/one"))[1]
    with pytest.raises(UsageError, match="set plan.architecture"):
        outline_for_plan(config, [])


def test_short_flags_are_the_verbs_alone():
    config = parse(["plan", "--topology", "v5e:8x8", "--search", "--json"])[1].plan
    assert (config.topology, config.search, config.json) == ("v5e:8x8", True, True)
    assert not parse(["plan", "--search=false"])[1].plan.search
    with pytest.raises(UsageError, match="topology"):
        parse(["train", "--topology", "v5e:8x8"])


class Place:
    def __init__(self, *coords):
        self.coords = coords


def links(chip, sizes, places):
    """Number of links that a group of these places uses, on a slice of these sizes."""
    every = list(itertools.product(*map(range, sizes)))
    topology = Topology("a slice", CHIPS[chip], sizes, tuple(Place(*place) for place in every))
    group = tuple(every.index(place) for place in places)
    return 1e9 / seconds_to_send(topology, group, 1e9) / CHIPS[chip].link_rate


def test_a_group_has_the_links_of_the_axes_it_extends_over():
    """Whole axes of cubes are rings, half of one is a line."""
    along_y = [(0, y, 0) for y in range(8)]
    plane = list(itertools.product(range(4), range(8), [0]))
    assert links("v5p", (4, 8, 4), along_y) == pytest.approx(2)
    assert links("v5p", (4, 8, 4), along_y[:4]) == pytest.approx(1)
    assert links("v5p", (4, 8, 4), plane) == pytest.approx(4)


def test_which_slices_are_tori():
    """Whole cubes of a v5p, each axis of 16 of a v5e."""
    half_cube = list(itertools.product(range(2), range(2), range(4)))
    assert links("v5p", (2, 2, 4), half_cube) == pytest.approx(3)
    with_16 = list(itertools.product(range(8), range(16), [0]))
    assert links("v5e", (8, 16, 1), with_16) == pytest.approx(3)


def test_no_room_for_a_cache_is_an_answer(tmp_path):
    lengths = ("rollout.max_new_tokens=65536", "training.row_length=65568")
    flags = [f"--{flag}" for flag in (*lengths, "model.max_positions=131072")]
    config = parse(tiny_arguments(tmp_path, *flags))[1]
    chip = dataclasses.replace(CHIPS["cpu"], hbm=1.0)
    run = planned(outline_for_plan(config, jax.devices()[:1]))
    topology = Topology("cpu:1", chip, (1,), tuple(jax.devices()[:1]))
    updates = Plan(run, topology, make_workload(run), (), {"updates": {}}, (), ())
    refused = add_rollouts(updates, PlanningTools(log=print))
    assert refused.refused[0].name == "the sampler's cache" and not refused.fits
    text = format_plan(refused)
    assert "there is no room for the sampler's cache:\n    the KV cache of one prompt" in text
    assert refused.memory["rollouts"]["sampler's parameters"] > 0


def test_names_of_topologies():
    assert parse_topology("v5p:4x4x4") == ("v5p", (4, 4, 4)) and parse_topology("cpu:8") == (
        "cpu",
        (8,),
    )


REFUSED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm. \
Used 18.51G of 15.75G hbm. Exceeded hbm capacity by 2.76G.

Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(train_step)/while/body/attention/dot_general"
     Shape: f32[1,32,8192,4096]{3,2,1,0:T(8,128)}
     Unpadded size: 4.00G
     ==========================

  2. Size: 1.50G
     Shape: bf16[28,8192,3584]{2,1,0:T(8,128)(2,1)}
     ==========================
"""


def test_out_of_memory_is_an_answer():
    class Refusing:
        def compile(self):
            raise jax.errors.JaxRuntimeError(REFUSED)

    figures = program_cost("train", Refusing(), trips_by_scope({}, 1), 8)
    assert figures == OutOfMemory(
        "train",
        18.51 * 2**30,
        (
            "4.00G f32[1,32,8192,4096] jit(train_step)/while/body/attention/dot_general",
            "1.50G bf16[28,8192,3584] ?",
        ),
    )
    assert bytes_needed("train", Refusing()) == float("inf")
