"""Every recipe loads, and its state and batches are laid out over each hardware's memory."""

import dataclasses
import functools
import math
import re

import jax
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType
from machines import Device, hosts
from tiny_runs import ROOT

from srft_jax.config import ObjectiveConfig, parse
from srft_jax.mesh import AXES, decode_mesh, make_mesh, mesh_shape
from srft_jax.models import families
from srft_jax.models.hf_config import read_config
from srft_jax.models.tokenizer import load_tokenizer
from srft_jax.objectives.methods import expand
from srft_jax.planning.chips import CHIPS, GIB
from srft_jax.planning.topology import parse_topology
from srft_jax.setup.config_checks import check_config
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state, state_shardings

RECIPES = sorted((ROOT / "configs" / "recipes").iterdir())
HARDWARE = {path.stem: path for path in sorted((ROOT / "configs" / "hardware").iterdir())}
METHODS = {"srft": 7, "luffy": 7, "grpo": 8, "sft_rl": 8}  # completions of a group
MODELS = {
    "qwen2.5_math_7b": "Qwen2.5-Math-7B",
    "qwen2.5_math_1.5b": "Qwen2.5-Math-1.5B",
    "llama_3.1_8b": "Llama-3.1-8B",
    "qwen3_8b": "Qwen3-8B",
}
DEVICES = {"v5e_8x8": 64, "v5p_2x2x4": 16, "v6e_4x8": 32, "8x80gb_gpu": 8}


def names(path):
    """In: srft_qwen3_8b_openr1_math_46k.yaml.  Out: ("srft", "qwen3_8b")."""
    (method_and_model,) = [
        (method, model)
        for method in METHODS
        for model in MODELS
        if path.stem == f"{method}_{model}_openr1_math_46k"
    ]
    return method_and_model


def command(path):
    return path.read_text().splitlines()[0].removeprefix("# python run.py ").split()


@pytest.fixture(scope="module")
def configs():
    """The configuration of each recipe's first line, read from the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {path: parse(command(path))[1] for path in RECIPES}


@pytest.fixture(scope="module")
def on():
    """(recipe, hardware) -> its configuration there, but for the data."""

    @functools.cache
    def configuration(path, hardware):
        return parse([f"--config={HARDWARE[hardware]}", f"--config={path}"])[1]

    return configuration


def test_there_is_every_method_for_every_model_on_every_hardware():
    expected = {(method, model) for method in METHODS for model in MODELS}
    assert {names(path) for path in RECIPES} == expected and len(RECIPES) == len(expected)
    assert HARDWARE.keys() == DEVICES.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_with_command_hardware_time_and_result(path):
    first, second = path.read_text().splitlines()[:2]
    files = [
        r"hardware/\w+.yaml",
        f"recipes/{path.name}",
        "data/openr1_math_46k.yaml",
        "data/benchmarks_math.yaml",
    ]
    assert re.fullmatch("# python run.py" + "".join(f" --config configs/{x}" for x in files), first)
    assert re.fullmatch(r"# Hardware: \S.* Time: \S.* Result: not run here; \S.*", second)


@pytest.mark.parametrize("path", HARDWARE.values(), ids=lambda path: path.stem)
def test_hardware_starts_with_how_it_is_added(path):
    first, second = path.read_text().splitlines()[:2]
    assert re.fullmatch(
        rf"# python run.py --config configs/hardware/{path.name} --config RECIPE.yaml .*", first
    )
    assert re.match(r"# \w", second)
    assert yaml.safe_load(path.read_text()).keys() <= {
        "mesh", "model", "rollout", "training", "evaluation", "plan"
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_the_checks_that_need_no_files(path, configs):
    config = configs[path]
    method, model = names(path)
    objective = dataclasses.asdict(expand(config.objective))
    check_config(dataclasses.replace(config, objective=ObjectiveConfig(**objective)))
    assert config.run_dir == f"runs/{path.stem}"
    assert config.objective.preset == method
    assert config.model.path == f"models/{MODELS[model]}"
    assert config.plan.architecture == f"assets/architectures/{MODELS[model]}"
    assert config.data.train.hub.name == "Elliott/Openr1-Math-46k-8192"


def test_recipes_of_a_model_or_a_method_agree(configs):
    """They are copies; here is what holds them together."""
    for path, config in configs.items():
        method, model = names(path)
        srft = configs[path.with_name(f"srft_{model}_openr1_math_46k.yaml")]
        recipe_7b = configs[path.with_name(f"{method}_qwen2.5_math_7b_openr1_math_46k.yaml")]
        assert config.model == srft.model
        assert (config.data, config.rewards, config.evaluation) == (
            srft.data,
            srft.rewards,
            srft.evaluation,
        )
        assert config.training.optimizer == srft.training.optimizer
        assert (config.objective, config.training) == (recipe_7b.objective, recipe_7b.training)
        assert config.rollout == dataclasses.replace(
            srft.rollout, completions_per_prompt=METHODS[method]
        )


def test_the_template_of_models_that_have_none():
    """One that bears a system turn, after which a demonstration's <think> comes whole."""
    template = str(ROOT / "assets" / "chat_templates" / "plain.jinja")
    tokenizer = load_tokenizer(ROOT / "assets" / "tokenizer", template)
    turns = [("system", "S"), ("user", "1+1"), ("assistant", "2"), ("user", "2+2")]
    (ids,) = tokenizer.encode_prompts([turns])
    end = tokenizer.spell([tokenizer.eos_id])
    assert tokenizer.spell(ids) == (
        f"S\n\nUser: 1+1\n\nAssistant:\n2{end}\n\nUser: 2+2\n\nAssistant:\n"
    )
    assert tokenizer.think_prefix == ""


def test_the_7b_recipe_is_the_papers(configs):
    """128 prompts in two updates, 8 a group, 1e-6 constant, 500 steps, T = 1, 1024 + 8192."""
    config = configs[ROOT / "configs/recipes/srft_qwen2.5_math_7b_openr1_math_46k.yaml"]
    data, rollout, training = config.data, config.rollout, config.training
    optimizer = training.optimizer
    assert (config.model.rope_theta, config.model.max_positions) == (40_000, 16_384)
    assert (data.prompts_per_step, training.updates_per_rollout) == (128, 2)
    assert (rollout.completions_per_prompt, rollout.temperature, rollout.top_p) == (7, 1, 1)
    assert (data.max_prompt_tokens, rollout.max_new_tokens) == (1024, 8192)
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-6, 0)
    assert (optimizer.schedule, optimizer.clip_norm) == ("constant", 1.0)
    assert training.num_steps == 500
    assert expand(config.objective).kl == 0


# ---- on the hardware ----


def mesh_of(config):
    sizes = mesh_shape(config.mesh, math.prod(parse_topology(config.plan.topology)[1]))
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


HOSTS = {
    "v5e_8x8": hosts("TPU v5 lite", 8, 8),
    "v5p_2x2x4": hosts("TPU v5", 2, 2, 4),
    "v6e_4x8": hosts("TPU v6 lite", 4, 8),
    "8x80gb_gpu": [Device(n, "H100", platform="gpu") for n in range(8)],
}


def one_device(mesh):
    return AbstractMesh((1,) * len(mesh.axis_names), mesh.axis_names, axis_types=mesh.axis_types)


def bytes_on_a_device(shapes, shardings):
    """Bytes on a device of arrays of these shapes, laid out by these shardings."""
    sizes = jax.tree.map(
        lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings
    )
    return sum(jax.tree.leaves(sizes))


def state_gib(config, mesh):
    """GiB of parameters, optimizer states and float32 gradients on each device."""
    model = read_config(ROOT / config.plan.architecture)
    two_stages = expand(config.objective).sft_steps > 0
    optimizers = {
        name: make_optimizer(config.training.optimizer, model, 1000)
        for name in ["policy", "demonstration"][: 1 + two_stages]
    }
    params = families.by_path(
        {
            row.path: jax.ShapeDtypeStruct(families.stacked_shape(row, model), "float32")
            for row in families.parameters(model)
        }
    )
    shapes = jax.eval_shape(lambda p: new_state(p, optimizers), params)
    where = state_shardings(model, optimizers, mesh)
    gradients = bytes_on_a_device(params, where.params)
    return (bytes_on_a_device(shapes, where) + gradients) / GIB


@pytest.mark.parametrize("hardware", DEVICES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_split_over_the_hardware(path, hardware, on):
    config = on(path, hardware)
    mesh, (kind, sizes) = mesh_of(config), parse_topology(config.plan.topology)
    assert mesh.size == math.prod(sizes) == DEVICES[hardware]
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    assert config.training.rows_per_microbatch % ways == 0
    gib, whole = state_gib(config, mesh), state_gib(config, one_device(mesh))
    assert gib < CHIPS[kind].hbm / GIB
    # 16 bytes a parameter, 24 with two optimizers, all split evenly; biases alone are left whole.
    assert gib < 1.01 * whole / (mesh.size / mesh.shape["data"])


@pytest.mark.parametrize("hardware", DEVICES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_devices_that_share_a_copy_are_of_one_host_and_have_a_kv_head_each(path, hardware, on):
    config = on(path, hardware)
    mesh = decode_mesh(make_mesh(config.mesh, HOSTS[hardware]), config.rollout.tensor)
    assert mesh.size == DEVICES[hardware]
    assert read_config(ROOT / config.plan.architecture).num_kv_heads % mesh.shape["tensor"] == 0
