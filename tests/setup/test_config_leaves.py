"""No dead knobs: another value of any key changes what a run does, or is refused."""

import dataclasses
import functools
import json
import types
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dry_plan import dry_plan
from dry_run import dry_divergence, dry_export, dry_generate, dry_inspect, dry_run
from tiny_runs import ROOT, changed_architecture, tiny_arguments

from srft_jax.batch import Batch, Rows
from srft_jax.config import DistributedConfig, RunConfig, UsageError, parse
from srft_jax.data import sources
from srft_jax.data.examples import Example
from srft_jax.data.sources import load_sets
from srft_jax.host import processes
from srft_jax.host.jax_options import jax_options
from srft_jax.models import forward, init_params, output_head
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.planned import forward_options, with_rows
from srft_jax.training.loading import load_frozen
from srft_jax.training.logprobs import make_old_logprobs


def leaves(section=RunConfig, prefix=""):
    """Every key that a user can set, sections that may be null included."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        nested = [option for option in options if dataclasses.is_dataclass(option)]
        if nested:
            yield from leaves(nested[0], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


# ---- probes: what a configuration does, as something that can be compared ----


def run(config):
    return dry_run(config)[0]


def sets(config):
    """What is read before it is encoded."""
    return load_sets(config.data)


def asked_for(config):
    """What reasoning-gym is asked for, installed or not."""

    def load(config, set_name):
        return (Example(f"{config} for {set_name}", "1"),)

    with mock.patch.object(sources, "load_gym", load):
        return sets(config)


def printed(config):
    """The samples, which are indented; the lines of progress hold times."""
    return [line for line in dry_run(config)[1].split("\n") if line.startswith("  ")]


def place(config):
    """Name of the run directory: in the test's directory each configuration has one of its own."""
    dry_run(config)
    return config.run_dir.rpartition("/")[2]


def traces(config):
    """Traces that are written."""
    dry_run(config)
    return sorted(path.name for path in Path(config.run_dir).glob("profile/*"))


def options_here(config):
    """JAX's options as `run.py` takes them from a configuration."""
    return jax_options(config.model.matmul_precision, config.compilation_cache, config.run_dir)


def program(config):
    """Initial weights and forward pass as JAX sees them, constants included."""
    setup = prepare(config)

    def logits(key):
        params = init_params(setup.model_config, key)
        inputs = (jnp.zeros((1, 4), jnp.int32) for _ in range(3))
        hidden = forward(params, setup.model_config, *inputs, runtime=setup.runtime).hidden
        return hidden @ output_head(params, setup.model_config).astype(hidden.dtype)

    with options_here(config):
        closed = jax.make_jaxpr(logits)(jax.random.key(0))
    return str(closed.jaxpr), [np.asarray(x).tolist() for x in closed.consts]


def cached(config):
    """Whether compiled programs are kept, and where."""
    with options_here(config):
        names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
        return [jax.config.values[name] for name in names]


def microbatch(config):
    """Rows that are chosen, were each to need 4 MiB."""
    setup, _ = with_rows(prepare(config), needed_mib=lambda run: 4 * run.training.rows)
    return setup.config.training.rows


def kept(config):
    """What is left out of the sets, or the mistake that it is."""
    try:
        setup = prepare(config)
        return setup.data.dropped, setup.data.rows
    except UsageError as error:
        return str(error)


def gradient_program(config):
    """Backward pass as JAX sees it."""
    setup = prepare(config)

    def total(params):
        inputs = (jnp.zeros((1, 4), jnp.int32) for _ in range(3))
        return forward(params, setup.model_config, *inputs, runtime=setup.runtime).hidden.sum()

    params = jax.eval_shape(lambda: init_params(setup.model_config, jax.random.key(0)))
    return str(jax.make_jaxpr(jax.grad(total))(params))


def logprobs_program(config):
    """The trainer's log-probs, head included, as JAX sees them."""
    setup = prepare(config)
    kinds = {"loss_mask": bool, "correct": bool}
    kinds |= dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), np.int32)
    kinds |= dict.fromkeys(("sequence_ids", "role"), np.int32)
    rows = Rows(
        **{
            field.name: np.zeros((1, 1, 4), kinds.get(field.name, np.float32))
            for field in dataclasses.fields(Rows)
        }
    )
    batch = Batch(rows, normalisers=None, num_microbatches=np.int32(1), on_policy=False)
    params = jax.eval_shape(lambda: init_params(setup.model_config, jax.random.key(0)))
    logprobs = make_old_logprobs(forward_options(setup))
    return str(logprobs.trace(params, batch).jaxpr)


def frozen(config):
    """What is held beside the train state."""
    setup = prepare(config)
    section, model = setup.config.model, setup.model_config
    return str(jax.eval_shape(lambda: load_frozen(section, model, setup.mesh, setup.config.seed)))


def met(config):
    """What JAX is told of the other processes."""
    with (
        mock.patch.object(jax.distributed, "initialize") as initialize,
        mock.patch.object(processes, "Peers"),
        processes.joined("train", config) as joined,
    ):
        assert joined == dataclasses.replace(config, distributed=DistributedConfig())
    return str(initialize.call_args)


@dataclasses.dataclass(frozen=True)
class Refused:
    """Not a probe but an expectation: the other value is a mistake, and this is said of it."""

    message: str


@dataclasses.dataclass(frozen=True)
class Change:
    """Another value for a key, how its effect shows, and what else the run is given.

    Attributes:
        value: The other value.
        probe: Observation that must change, or the expectation that the value is refused.
        base: Arguments of both runs.
        at: The part of a dry run, one of WALK, that changes first.
        says: Text in what the other value changes there, e.g. the value itself.
    """

    value: str
    probe: Callable | Refused = run
    base: tuple[str, ...] = ()
    at: str = ""
    says: str = ""


# Parts of a dry run, in the order in which a step comes to them.
WALK = (
    *("reference", "checkpoints", "pool", "sample", "score", "train step", "old logprobs"),
    *("gradient norms", "batch", "fixed", "loss", "params", "old logprobs of", "metrics"),
    *("samples", "save", "export"),
)


def first_change(before, after):
    """The first part of two dry runs that differs, and its lines that only the second has."""
    before, after = before.split("\n"), after.split("\n")
    gone, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
    parts = {line.partition(" [")[0] for line in gone + new}
    first = min(parts, key=WALK.index)
    return first, [line for line in new if line.partition(" [")[0] == first]


def objective(**coefficients):
    return tuple(f"--objective.{name}={value}" for name, value in coefficients.items())


OWN = objective(demo_policy=0, demo_source="own", demo_per_step=3)
MIX = objective(mix="share", mix_start=0.9, mix_end=0.3, mix_steps=2)
PREFIX = objective(prefix="all", prefix_steps=3, prefix_until=3, prefix_end=0.2, prefix_chunks=0)
AUTO = ("--training.rows_per_microbatch=auto", "--training.memory_mib=16")
LORA = ("--model.lora.rank=2",)
KL = (*objective(kl=0.1), "--model.reference={dir}/reference")
# Groups of one: where there is no demonstration, all rewards are equal.
DROP = (*objective(drop_zero_std="true"), "--rollout.completions_per_prompt=1")
SFT = (
    *objective(sft_steps=2),
    "--training.demonstration_optimizer.schedule=cosine",
    "--training.demonstration_optimizer.warmup_steps=1",
    "--training.demonstration_optimizer.learning_rate=0.01",
    "--training.demonstration_optimizer.weight_decay=0.1",
)
TOGETHER = tuple(
    f"--distributed.{name}"
    for name in ("coordinator=localhost:1", "num_processes=3", "process_id=0")
)
PLAN = ("--plan.topology=cpu:1",)
MIXTURE = ("--data.train=null", "--data.mixture=[{files: {dir}/a.jsonl}]")

OVERLAP = (
    "--data.train=null",
    "--data.mixture=[{files: {dir}/a.jsonl}, {procedural: {count: 40, demonstrated: 40}}]",
    "--data.evaluation.held_out=null",
    "--data.evaluation.held_out={files: {dir}/a.jsonl}",
)


def source_rows(key):
    """The rows of a source, whose base is one with what the key is about."""

    def only(value):
        """The source and no other of this set; its values stay unless they are named."""
        return f"--{key}=null", f"--{key}={value}"

    files = only("{files: {dir}/b.jsonl}")
    hub = only("{hub: {name: {dir}/hub, subset: one}}")
    generated = only("{procedural: {count: 5, min_size: 4, max_size: 4}}")
    generator = only("{gym: {dataset: gsm_symbolic, count: 5}}")
    options = only("{files: {dir}/options.jsonl}")
    boxed = only("{files: {dir}/boxed.jsonl}")
    trained = key == "data.train"

    def demonstrated(value):
        if trained:
            return Change(value, sets, generated)
        return Change(value, Refused("only training problems are demonstrated"), generated)

    rows = {
        "files": Change("{dir}/d.jsonl", sets, files),
        "hub.name": Change("{dir}/other_hub", sets, hub),
        "hub.subset": Change("two", sets, hub),
        "hub.split": Change("test", sets, hub),
        "hub.revision": Change("v1", Refused("a local folder, which has no revisions"), hub),
        "procedural.family": Change("sums", sets, generated),
        "procedural.seed": Change("1", sets, generated),
        "procedural.count": Change("6", sets, generated),
        "procedural.demonstrated": demonstrated("2"),
        "procedural.min_size": Change("3", sets, generated),
        "procedural.max_size": Change("5", sets, generated),
        "procedural.terse_fraction": demonstrated("0.5"),
        "gym.dataset": Change("chain_sum", asked_for, generator),
        "gym.seed": Change("1", asked_for, generator),
        "gym.count": Change("6", asked_for, generator),
        "gym.options": Change("{x: 1}", asked_for, generator),
        "columns": Change("{answer: other}", sets, files),
        "answer_from": Change("boxed", sets, boxed),
        "shuffle_options": Change("false", sets, options),
        "instruction": Change("Think.", sets, files),
        "kind": Change("exact", sets, files),
        "distinct": Change("true", sets, files),
        "limit": Change("3", sets, files),
        "weight": Change("2", Refused("weighs nothing outside data.mixture"), files),
    }
    return {f"{key}.{name}": change for name, change in rows.items()}


def scalings(prefix):
    """Rows of a rope scaling."""

    def base(kind, **fields):
        fields = {"kind": kind, "factor": 4, "original_max_positions": 1024} | fields
        scaling = tuple(f"--{prefix}.{name}={value}" for name, value in fields.items())
        return ("--model.rope_theta=10000", *scaling)

    llama3, yarn = base("llama3"), base("yarn")
    mscale = base("yarn", mscale=0.5, mscale_all_dim=0.7)
    return {
        f"{prefix}.kind": Change("linear", program, yarn),
        f"{prefix}.factor": Change("2", program, yarn),
        f"{prefix}.original_max_positions": Change("32", program, yarn),
        f"{prefix}.low_freq_factor": Change("2", program, llama3),
        f"{prefix}.high_freq_factor": Change("40", program, llama3),
        f"{prefix}.beta_fast": Change("2", program, yarn),
        f"{prefix}.beta_slow": Change("0.01", program, yarn),
        f"{prefix}.attention_factor": Change("2", program, yarn),
        f"{prefix}.mscale": Change("0.6", program, mscale),
        f"{prefix}.mscale_all_dim": Change("0.6", program, mscale),
        f"{prefix}.truncate": Change("false", program, yarn),
    }


TABLE = {
    "run_dir": Change("elsewhere", place),
    "seed": Change("1", at="sample"),
    "compilation_cache": Change("none", cached),
    "model.path": Change("{dir}", Refused("exactly one of model.path and model.architecture")),
    "model.architecture": Change("{dir}/deeper", program),
    "model.tokenizer": Change("{dir}/tokenizer", at="sample"),
    "model.chat_template": Change("{dir}/own.jinja", at="sample"),
    "model.lora.rank": Change("4", program, base=LORA),
    "model.lora.alpha": Change("8", program, base=LORA),
    "model.lora.targets": Change("[query,value]", program, base=LORA),
    "model.lora.base_dtype": Change("bfloat16", frozen, base=LORA),
    "model.reference": Change(
        "{dir}/other_reference", at="reference", says="other_reference", base=KL
    ),
    "model.rope_theta": Change("1000", program),
    "model.max_positions": Change("20", Refused("exceed the model's 20")),
    **scalings("model.rope_scaling"),
    "model.dtype": Change("bfloat16", program),
    "model.remat": Change("block", gradient_program),
    "model.matmul_precision": Change("highest", program),
    "model.attention": Change("splash", Refused("runs on devices of kind tpu")),
    "mesh.data": Change("3", Refused("mesh data=3 x fsdp=1 x context=1 x tensor=1 does not fit")),
    "mesh.fsdp": Change("3", Refused("fsdp=3 x context=1 x tensor=1 does not fit")),
    "mesh.context": Change("3", Refused("fsdp=1 x context=3 x tensor=1 does not fit")),
    "mesh.tensor": Change("3", Refused("fsdp=1 x context=1 x tensor=3 does not fit")),
    "mesh.slices": Change("2", Refused("mesh.slices = 2, but the number of processes")),
    "distributed.coordinator": Change("localhost:2", met, TOGETHER),
    "distributed.num_processes": Change("2", met, TOGETHER),
    "distributed.process_id": Change("1", met, TOGETHER),
    **source_rows("data.train"),
    "data.mixture": Change(
        "[{files: {dir}/a.jsonl}, {files: {dir}/b.jsonl}]", at="sample", base=MIXTURE
    ),
    "data.evaluation": Change("{other: {files: {dir}/b.jsonl}}", at="sample"),
    "data.system_prompt": Change("Be brief.", Refused("refuses a conversation with the roles sys")),
    "data.overlap": Change("drop", kept, base=OVERLAP),
    "data.too_long": Change("drop", kept, base=("--data.max_demonstration_tokens=6",)),
    "data.prompts_per_step": Change("6", at="sample"),
    "data.max_prompt_tokens": Change("5", Refused("but data.max_prompt_tokens is 5")),
    "data.max_demonstration_tokens": Change("6", kept, base=("--data.too_long=drop",)),
    "rollout.top_k": Change("5", at="sample", says="top_k=5"),
    "rollout.top_p": Change("0.5", at="sample", says="top_p=0.5"),
    "rollout.min_p": Change("0.1", at="sample", says="min_p=0.1"),
    "rollout.completions_per_prompt": Change("4", at="sample"),
    "rollout.temperature": Change("0.5", at="sample", says='"temperature": 0.5'),
    "rollout.max_new_tokens": Change("15", at="sample", says='"max_new_tokens": 15'),
    "rollout.stop_strings": Change("[</think>]", at="sample", says="</think>"),
    "rollout.slots": Change("8", at="sample", says='"slots": 8'),
    "rollout.segment": Change("4", at="sample", says='"segment": 4'),
    "rollout.cache_mib": Change("64", at="sample", says='"cache_mib": 64'),
    "rollout.tensor": Change("2", Refused("does not divide the 1 devices of a process")),
    "rewards.workers": Change("3", at="pool", says="[3, 2.0"),
    "rewards.timeout_seconds": Change("1", at="pool", says="[2, 1.0"),
    "rewards.correct_threshold": Change(
        "0", at="batch", base=("--objective.self_form=likelihood",)
    ),
    "rewards.options": Change(
        '{"math": {"require_think": false}}', at="pool", says="require_think"
    ),
    "rewards.shaping": Change('[{"kind": "format", "weight": 0.5}]', at="pool", says="format"),
    "objective.preset": Change("grpo", at="score"),
    "objective.expanded_from": Change("grpo", Refused("holds all coefficients of grpo")),
    "objective.demo_nll": Change("0.25", at="loss"),
    "objective.demo_nll_entropy": Change("1", at="loss"),
    "objective.demo_nll_probability": Change("p", at="loss"),
    "objective.demo_policy": Change("0.5", at="loss"),
    "objective.demo_ratio_gamma": Change("0.5", at="loss"),
    "objective.demo_source": Change("own", at="batch", base=OWN[:1] + OWN[2:]),
    "objective.demo_per_step": Change("4", at="batch", base=OWN),
    "objective.demo_buffer": Change("2", at="train step", base=OWN[:1]),
    "objective.gate": Change("either", at="batch"),
    "objective.gate_solved": Change("1", at="batch", base=objective(gate="demonstrations")),
    "objective.sft_steps": Change("1", at="sample"),
    "objective.mix": Change("share", at="batch", base=MIX[1:]),
    "objective.mix_start": Change("0.5", at="batch", base=MIX),
    "objective.mix_end": Change("0.5", at="batch", base=MIX),
    "objective.mix_steps": Change("1", at="batch", base=MIX),
    "objective.self_form": Change("likelihood", at="loss"),
    "objective.self_positive": Change("0.5", at="loss"),
    "objective.self_positive_entropy": Change("-1", at="loss"),
    "objective.self_negative": Change("0.5", at="loss"),
    "objective.surrogate": Change("cispo", at="loss"),
    "objective.clip_low": Change("0.1", at="loss"),
    "objective.clip_high": Change("0.3", at="loss"),
    "objective.dual_clip": Change("1.1", at="loss"),
    "objective.old_logprobs": Change("trainer", at="old logprobs"),
    "objective.importance_cap": Change("1.01", at="loss", base=objective(old_logprobs="trainer")),
    "objective.keep": Change("correct", at="batch"),
    "objective.mask_truncated": Change("true", at="batch"),
    "objective.overlong_buffer": Change("0.5", at="batch"),
    "objective.drop_zero_std": Change("true", at="batch", base=DROP[1:]),
    "objective.max_refills": Change("1", at="sample", base=DROP),
    "objective.prefix": Change("one", at="sample", base=PREFIX),
    "objective.prefix_start": Change("0.6", at="sample", base=PREFIX),
    "objective.prefix_end": Change("0.6", at="sample", base=PREFIX),
    "objective.prefix_steps": Change("1", at="sample", base=PREFIX),
    "objective.prefix_until": Change("1", at="sample", base=PREFIX),
    "objective.prefix_chunks": Change("2", at="sample", base=PREFIX),
    "objective.hint_nll": Change("0.5", at="batch", base=PREFIX),
    "objective.prefix_policy": Change("0.5", at="batch", base=PREFIX),
    "objective.prefix_top_entropy": Change(
        "0.4", at="batch", base=PREFIX + objective(prefix_policy=1)
    ),
    "objective.entropy_scope": Change("token", at="loss"),
    "objective.advantage_group": Change("self", at="batch"),
    "objective.advantage_std": Change("true", at="batch"),
    "objective.kl": Change("0.2", at="loss", base=KL),
    "objective.kl_estimator": Change("k2", at="loss", base=KL),
    "objective.kl_role": Change("demo", at="batch", base=KL + objective(kl_estimator="full")),
    "objective.entropy_bonus": Change("0.01", at="loss"),
    "objective.demo_aggregation": Change("sequences", at="batch"),
    "objective.policy_aggregation": Change("length_cap", at="batch"),
    "training.num_steps": Change("2", at="sample"),
    "training.updates_per_rollout": Change("1", at="batch"),
    "training.row_length": Change("40", at="batch"),
    "training.rows_per_microbatch": Change("16", at="batch"),
    "training.memory_mib": Change("64", microbatch, base=AUTO),
    "training.checkpoint_every": Change("2", at="save"),
    "training.keep_checkpoints": Change("1", at="checkpoints", says="[1]"),
    "training.logits_mib": Change("32", at="train step", says="32"),
    "training.max_skipped": Change("2", dry_divergence),
    "training.gradient_norms_every": Change("2", at="gradient norms"),
    "training.profile_steps": Change("[1]", traces),
    "training.optimizer.name": Change("adafactor", at="params"),
    "training.optimizer.state_dtype": Change("bfloat16", at="params"),
    "training.optimizer.learning_rate": Change("0.02", at="params"),
    "training.optimizer.warmup_steps": Change("3", at="params"),
    "training.optimizer.schedule": Change("constant", at="params"),
    "training.optimizer.final_fraction": Change("0.5", at="params"),
    "training.optimizer.b1": Change("0.8", at="params"),
    "training.optimizer.b2": Change("0.9", at="params"),
    "training.optimizer.weight_decay": Change("0.2", at="params"),
    "training.optimizer.clip_norm": Change("0.5", at="params"),
    "training.demonstration_optimizer.name": Change("adafactor", at="params", base=SFT),
    "training.demonstration_optimizer.state_dtype": Change("bfloat16", at="params", base=SFT),
    "training.demonstration_optimizer.learning_rate": Change("0.02", at="params", base=SFT),
    "training.demonstration_optimizer.warmup_steps": Change("3", at="params", base=SFT),
    "training.demonstration_optimizer.schedule": Change("constant", at="params", base=SFT),
    "training.demonstration_optimizer.final_fraction": Change("0.5", at="params", base=SFT),
    "training.demonstration_optimizer.b1": Change("0.8", at="params", base=SFT),
    "training.demonstration_optimizer.b2": Change("0.9", at="params", base=SFT),
    "training.demonstration_optimizer.weight_decay": Change("0.2", at="params", base=SFT),
    "training.demonstration_optimizer.clip_norm": Change("0.5", at="params", base=SFT),
    "evaluation.every": Change("2", at="sample"),
    "evaluation.max_new_tokens": Change("15", at="sample", says='"max_new_tokens": 15'),
    "evaluation.slots": Change("16", at="sample"),
    "generate.top_k": Change("5", dry_generate),
    "generate.top_p": Change("0.5", dry_generate),
    "generate.min_p": Change("0.1", dry_generate),
    "generate.prompt": Change("1+1", dry_generate),
    "generate.num_prompts": Change("3", dry_generate),
    "generate.temperature": Change("1", dry_generate),
    "generate.completions": Change("2", dry_generate),
    "inspect.set": Change("ood", dry_inspect),
    "inspect.rows": Change("1", dry_inspect),
    "inspect.ids": Change("true", dry_inspect),
    "export.step": Change("2", dry_export),
    "export.path": Change("elsewhere", dry_export),
    "export.dtype": Change("bfloat16", at="export", says="bfloat16"),
    "export.lora": Change("adapter", Refused("export.lora = adapter needs model.path"), base=LORA),
    "plan.topology": Change("h100:1", dry_plan, PLAN),
    "plan.architecture": Change("{dir}/deeper", dry_plan, PLAN),
    "plan.mean_prompt": Change("4", dry_plan, PLAN),
    "plan.mean_completion": Change("4", dry_plan, PLAN),
    "plan.search": Change("true", dry_plan, PLAN),
    "plan.search_seconds": Change("50", dry_plan, (*PLAN, "--plan.search=true")),
    "plan.scaling": Change("true", dry_plan, ("--plan.topology=v5e:1x1",)),
    "plan.json": Change("true", dry_plan, PLAN),
    "report.samples_every": Change("1", printed),
    "report.samples_per_step": Change("1", at="samples"),
}

# Keys of an item of `data.evaluation`, which is one key of the configuration.
SET_KEYS = source_rows("data.evaluation.held_out")

# Three steps of two updates each, so that ratios, moments and schedules have room to show.
BASE = ("--training.num_steps=3", "--training.updates_per_rollout=2")


def test_the_table_holds_every_key():
    assert list(TABLE) == list(leaves())


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_hub(path, number):
    """A folder in the hub's layout, of two subsets with two splits each."""
    lines = ["---", "configs:"]
    for subset in ("one", "two"):
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
            row = dict(prompt=f"{subset} {split} {number}", answer="1")
            write_rows(path / subset / f"{split}-00000-of-00001.jsonl", [row])
    (path / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Data files, references, and a tokenizer whose chat template has one more character."""
    path = tmp_path_factory.mktemp("leaves")
    for number, name in enumerate("abd", start=1):
        rows = [
            dict(
                prompt=f"{n}+{number}0", answer=f"{n}", other="1", demonstration="<think></think>1"
            )
            for n in range(5)
        ]
        write_rows(path / f"{name}.jsonl", [*rows, rows[0]])
    write_rows(path / "boxed.jsonl", [dict(prompt="q", answer=r"so \boxed{1}")])
    options = dict(question="q", options=[*"abcdefgh"], answer_index=0)
    write_rows(path / "options.jsonl", [options])
    for number, name in enumerate(("hub", "other_hub")):
        write_hub(path / name, number)
    for name in ("reference", "other_reference"):
        changed_architecture(path / name)
    changed_architecture(path / "deeper", num_layers=3)
    (path / "own.jinja").write_text("{{ messages[-1].content }}=")
    (path / "tokenizer").mkdir()
    for file in (ROOT / "assets" / "tokenizer").iterdir():
        text = file.read_text()
        if file.name == "tokenizer_config.json":
            settings = json.loads(text)
            settings["chat_template"] = "!" + settings["chat_template"]
            text = json.dumps(settings)
        (path / "tokenizer" / file.name).write_text(text)
    return path


@pytest.fixture(scope="module")
def observe(directory, tmp_path_factory):
    """What a probe sees of the tiny run with these arguments; the base's is looked at once."""

    @functools.cache
    def observe(probe, arguments):
        run_dir = tmp_path_factory.mktemp("dry") / "run"
        filled = [argument.replace("{dir}", str(directory)) for argument in arguments]
        return probe(parse(tiny_arguments(run_dir, *filled))[1])

    return observe


@pytest.mark.slow
@pytest.mark.parametrize("key", TABLE | SET_KEYS)
def test_another_value_shows(key, observe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `elsewhere` is
    change = (TABLE | SET_KEYS)[key]
    base = BASE + change.base
    other = (*base, f"--{key}={change.value}")
    if isinstance(change.probe, Refused):
        with pytest.raises(UsageError, match=change.probe.message):
            observe(prepare, other)
        return
    before, after = observe(change.probe, base), observe(change.probe, other)
    assert before != after
    if change.probe is run:
        part, lines = first_change(before, after)
        assert part == change.at
        assert change.says in "\n".join(lines)


@pytest.mark.slow
def test_nothing_else_shows(observe, tmp_path_factory):
    """The probes see the configuration, not the clock or the directory."""
    for probe in (run, printed, program, dry_generate, dry_inspect, dry_export):
        observe_again = probe(
            parse(tiny_arguments(tmp_path_factory.mktemp("again") / "run", *BASE))[1]
        )
        assert observe(probe, BASE) == observe_again
