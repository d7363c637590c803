"""Which candidates a search compiles, and in what order they are named."""

import math

import jax
import pytest
from dry_plan import dry_plan
from machines import hosts, slices
from tiny_runs import tiny_arguments, tiny_model

from srft_jax.config import UsageError, parse
from srft_jax.models import families
from srft_jax.planning import search
from srft_jax.planning.chips import CHIPS
from srft_jax.planning.estimate import Estimate, estimate_updates
from srft_jax.planning.memory import resident_bytes
from srft_jax.planning.planning_tools import PlanningTools
from srft_jax.planning.topology import Topology
from srft_jax.planning.workload import make_workload
from srft_jax.setup.plan_checks import outline_for_plan
from srft_jax.tasks.planned import planned


def planned_run(config, devices):
    return planned(outline_for_plan(config, devices))


def test_a_search_falls_back_to_what_needs_the_least(tmp_path):
    """The fastest by arithmetic is refused, and with it, untried, what keeps more on its mesh."""
    config = parse(tiny_arguments(tmp_path, "--plan.topology=cpu:1", "--plan.search=true"))[1]

    def is_least(run):
        return run.training.rows == 1 and run.forward.runtime.remat == "block"

    asked, out = dry_plan(config, fits=is_least)
    tried = [(run.forward.runtime.remat, run.training.rows) for run, _ in asked]
    assert tried == [("dots", 1), ("block", 1), ("block", 1)]  # searched twice, planned
    assert "--training.rows_per_microbatch=1 --model.remat=block" in out
    with pytest.raises(UsageError, match="no mesh, microbatch and remat fits"):
        dry_plan(config, fits=lambda run: False)


UNHURRIED = ("--plan.topology=cpu:1", "--plan.search=true", "--plan.search_seconds=100000")


def test_a_search_ends_where_no_other_is_estimated_to_be_faster(tmp_path):
    """The first that fits takes next to no time here."""
    config = parse(tiny_arguments(tmp_path, *UNHURRIED))[1]
    asked, _ = dry_plan(config, fits=lambda run: run.forward.runtime.remat == "block", flops=1.0)
    tried = [(run.forward.runtime.remat, run.training.rows) for run, _ in asked]
    assert tried == [("dots", 1), ("block", 1), ("block", 1)]  # refused, searched, planned


def test_a_search_ends_with_four_that_fit(tmp_path, capsys):
    """Each takes longer than any estimate here."""
    asked, _ = dry_plan(parse(tiny_arguments(tmp_path, *UNHURRIED))[1], flops=1e12)
    assert "12 candidates, 12 that may fit" in capsys.readouterr().err
    assert len(asked) == 4 + 1  # searched, planned


def test_a_search_leaves_out_meshes_that_rollouts_cannot_have(tmp_path):
    """On 4 x 4 chips, data 4 x fsdp 4 has lines of four chips along fsdp, of two hosts each."""
    devices = tuple(hosts("TPU v5 lite", 4, 4))
    topology = Topology("v5e:4x4", CHIPS["v5e"], (4, 4), devices)

    def run(tensor):
        mesh = ("--mesh.data=1", "--mesh.fsdp=16", "--training.rows_per_microbatch=16")
        flags = tiny_arguments(tmp_path, *mesh, f"--rollout.tensor={tensor}")
        return planned_run(parse(flags)[1], devices)

    def mesh_sizes(tensor):
        return {moved.mesh.axis_sizes for moved in search.runs_on_meshes(run(tensor), topology)}

    assert {(1, 16, 1, 1), (4, 4, 1, 1)} < mesh_sizes(1)
    assert mesh_sizes(4) & {(1, 16, 1, 1), (4, 4, 1, 1)} == {(1, 16, 1, 1)}
    with pytest.raises(UsageError, match="rollout.tensor = 32 does not divide the 16 devices"):
        search.search(run(32), topology, PlanningTools(), seconds=1)


def test_what_rollouts_cannot_have_is_said_before_anything_compiles(tmp_path):
    config = parse(tiny_arguments(tmp_path, "--plan.topology=cpu:1", "--rollout.tensor=2"))[1]

    def fits(run):
        raise AssertionError("compiled")

    with pytest.raises(UsageError, match="rollout.tensor = 2 does not divide the 1 devices"):
        dry_plan(config, fits)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--plan.mean_completion=0"], "plan.mean_completion = 0 is not from 1 to the longest, 16"),
        (["--plan.mean_prompt=999"], "plan.mean_prompt = 999 is not from 1 to the longest"),
        (["--plan.scaling=true"], "plan.scaling plans for slices of TPUs, not for h100:1"),
        (["--rollout.tensor=2"], "rollout.tensor = 2 does not divide the 1 devices"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(flags, said, tmp_path):
    config = parse(tiny_arguments(tmp_path, "--plan.topology=h100:1", *flags))[1]
    with pytest.raises(UsageError, match=said):
        dry_plan(config)


def order_on_gpus(run_dir, *needed_and_exchange):
    """Exchange of the candidates that a search names, from shares of an h100 and seconds."""
    config = parse(tiny_arguments(run_dir, "--plan.topology=h100:8", "--plan.search=true"))[1]
    run, hbm = planned_run(config, jax.devices()[:1]), CHIPS["h100"].hbm
    candidates = [
        search.Candidate(run, Estimate(1.0, {"parameters": share * hbm}, 5.0, exchange))
        for share, exchange in needed_and_exchange
    ]
    fitting = search.fastest_first(search.fit_by_arithmetic(candidates, hbm))
    return [candidate.estimate.exchange for candidate in fitting]


def test_among_equally_fast_candidates_the_one_that_sends_less_comes_first(tmp_path):
    assert order_on_gpus(tmp_path, (0.1, 3.0), (0.2, 1.0), (0.3, 2.0)) == [1.0, 2.0, 3.0]


def test_on_gpus_what_just_fits_by_arithmetic_is_named_only_if_nothing_else_fits(tmp_path):
    assert order_on_gpus(tmp_path, (0.95, 1.0), (0.8, 2.0)) == [2.0]
    assert order_on_gpus(tmp_path, (0.95, 1.0), (1.05, 2.0)) == [1.0]


def test_an_estimate_counts_gradients_of_what_is_trained(tmp_path):
    """The head's, twice, and a layer's, of float32, which adapters do without."""
    whole, adapters = (
        estimated(tmp_path, *flags).hbm["activations and temporaries"]
        for flags in ((), ("--model.lora.rank=1",))
    )
    model = tiny_model()
    head = model.dim * model.vocab_size
    assert whole - adapters > 2 * 4 * head


def test_an_estimate_gathers_a_frozen_base_in_the_activations_dtype(tmp_path):
    """Not in the one that it is kept in."""
    exchange = [
        estimated(tmp_path, "--model.lora.rank=1", f"--model.lora.base_dtype={dtype}", fsdp=8)
        for dtype in ("float32", "bfloat16")
    ]
    assert exchange[0].exchange == pytest.approx(exchange[1].exchange)
    assert exchange[0].hbm["parameters"] > 1.5 * exchange[1].hbm["parameters"]


@pytest.mark.parametrize("flags", [(), ("--model.lora.rank=1", "--model.lora.base_dtype=bfloat16")])
def test_an_estimate_gathers_the_reference_once(flags, tmp_path):
    """It has no backward pass, be it a copy of its own or the base of adapters."""
    plain, kl = (
        estimated(tmp_path, *flags, *more, fsdp=8) for more in ((), ("--objective.kl=0.1",))
    )
    model = tiny_model()
    numbers = sum(
        math.prod(families.stacked_shape(parameter, model))
        for parameter in families.parameters(model)
    )
    sent = (kl.exchange - plain.exchange) * CHIPS["cpu"].link_rate
    assert sent == pytest.approx(4 * numbers * 7 / 8, rel=0.05)


def estimated(run_dir, *flags, fsdp=1):
    mesh = (f"--mesh.fsdp={fsdp}", f"--training.rows_per_microbatch={8 * fsdp}")
    config = parse(tiny_arguments(run_dir, *flags, *mesh))[1]
    devices = tuple(slices(1, fsdp)) if fsdp > 1 else tuple(jax.devices()[:1])
    topology = Topology(f"cpu:{fsdp}", CHIPS["cpu"], (fsdp,), devices)
    run = planned_run(config, devices)
    return estimate_updates(run, make_workload(run), topology, resident_bytes(run))


@pytest.mark.parametrize(("number", "data"), [(1, {1, 2, 4, 8}), (2, {2, 4, 8})])
def test_a_search_keeps_data_over_all_slices(number, data, tmp_path):
    config = parse(tiny_arguments(tmp_path, f"--mesh.slices={number}"))[1]
    devices = tuple(slices(number, 8 // number))
    topology = Topology("h100:8", CHIPS["h100"], (8,), devices, number)
    moved = search.runs_on_meshes(planned_run(config, devices), topology)
    shapes = [run.mesh.shape for run in moved]
    assert {shape["data"] for shape in shapes} == data
    assert all(math.prod(shape.values()) == 8 for shape in shapes)
