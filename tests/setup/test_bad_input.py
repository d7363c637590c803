"""A user's mistake: exit code 2 and one line that names it, before anything compiles."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_runs import changed_architecture, tiny_arguments

import run
from srft_jax.config import UsageError, parse
from srft_jax.mesh import AXES
from srft_jax.setup.model_checks import check_offload, check_sizes
from srft_jax.setup.prepare import prepare
from srft_jax.tasks import begin

POSITIONS = "--model.max_positions=30"
NO_EVALUATION = ("--data.evaluation={}",)
JSONL = (
    "--data.train.procedural=null",
    "--data.train.files={dir}/{name}.jsonl",
    *NO_EVALUATION,
)

# What stands in the files of rows; the first row is always good.
GOOD = '{"prompt": "1+2", "answer": "3", "demonstration": "<think>3</think>3"}'
FILES = {
    "malformed": "{prompt: 1}",
    "promptless": '{"answer": "3"}',
    "answerless": '{"prompt": "1+1"}',
    "misspelt": '{"prompt": "1+1", "answer": "2", "demonstratoins": []}',
    "long": f'{{"prompt": "1+1", "answer": "2", "demonstration": "{"1" * 16}"}}',
    "kind": '{"prompt": "1+1", "answer": "2", "kind": "final_anwser"}',
    "gold": '{"prompt": "1+4", "answer": "five", "kind": "numeric"}',
    "long_prompt": f'{{"prompt": "{"1" * 30}", "answer": "2"}}',
}


def jsonl(name):
    return [argument.replace("{name}", name) for argument in JSONL]


NO_DEMONSTRATIONS = "--data.train.procedural.demonstrated=0"
FEW_DEMONSTRATIONS = "--data.train.procedural.demonstrated=3"

# Case -> what is added to the tiny run's command line, and what the message must say.
CASES = {
    "unknown key": (["--trainig.num_steps=1"], "--trainig.num_steps"),
    "unknown nested key": (["--training.num_step=1"], "--training.num_step"),
    "unknown key in a file": (["--config={dir}/unknown.yaml"], "nonsense"),
    "ill-typed key": (["--training.num_steps=many"], '"training.num_steps": Expected a'),
    "not a choice": (["--objective.preset=ppo"], '"objective.preset"'),
    "the choices": (["--objective.preset=ppo"], "'relift', 'uft', 'prefix_rft', 'on_policy_sft'"),
    "a step that is none": (
        ["--training.profile_steps=[0, 2]"],
        "training.profile_steps has [0], which are none of the steps from 1 to",
    ),
    "decays that Adafactor has not": (
        ["--training.optimizer.name=adafactor", "--training.optimizer.b2=0.99"],
        "training.optimizer.b2 = 0.99 says nothing to training.optimizer.name = adafactor",
    ),
    "no room": (["--training.memory_mib=0"], "training.memory_mib = 0 is not at least 1"),
    "missing config file": (["--config={dir}/none.yaml"], "{dir}/none.yaml"),
    "missing model": (
        ["--model.architecture=null", "--model.path={dir}/none"],
        "{dir}/none is not a directory",
    ),
    "no model": (["--model.architecture=null"], "exactly one of model.path and model.architecture"),
    "missing chat template": (
        ["--model.chat_template={dir}/none.jinja"],
        "model.chat_template = {dir}/none.jinja cannot be read",
    ),
    "system prompt that the template refuses": (
        ["--data.system_prompt=Be brief."],
        "refuses a conversation with the roles system, user: roles are user and assistant",
    ),
    "missing tokenizer": (["--model.tokenizer={dir}/none"], "{dir}/none is not a directory"),
    "tokenizer above the vocabulary": (
        ["--model.architecture={dir}/small_vocabulary"],
        "tokenizer has 262 tokens, but the model's vocabulary only 100",
    ),
    "impossible heads": (["--model.architecture={dir}/three_kv_heads"], "num_kv_heads = 3"),
    "no heads": (["--model.architecture={dir}/no_heads"], "num_kv_heads = 0, which is below 1"),
    "too few positions": (["--model.max_positions=20"], "28 tokens exceed the model's"),
    "no data": (["--data.train=null"], "exactly one of data.train and data.mixture"),
    "misspelt key": (
        ["--data.prompt_per_step=8"],
        "--data.prompt_per_step=8; did you mean --data.prompts_per_step?",
    ),
    "key of another section": (
        ["--training.learning_rate=1e-4"],
        "did you mean --training.optimizer.learning_rate?",
    ),
    "misspelt key of a source": (
        ["--data.train.file={dir}/kind.jsonl"],
        "error: Parser key \"data.train\": Option 'file' is not accepted\n",
    ),
    "ill-typed key of a source": (
        ["--data.train.procedural.count=many"],
        'error: Parser key "data.train": Parser key "procedural": Parser key "count": Expected',
    ),
    "two sources": (
        ["--data.train.files={dir}/kind.jsonl"],
        "data.train must have exactly one of files, hub, procedural, gym, but has files and",
    ),
    "weight of the only source": (["--data.train.weight=2"], "data.train.weight = 2.0 weighs"),
    "demonstrations of an evaluation set": (
        ["--data.evaluation.ood.procedural.demonstrated=2"],
        "ood.procedural.demonstrated = 2, but only training problems are demonstrated",
    ),
    "columns of problems": (
        ["--data.evaluation.ood.columns={prompt: a}"],
        "data.evaluation.ood.columns is of files",
    ),
    "misspelt field of a mapping": (
        [*jsonl("kind"), "--data.train.columns={promt: question}"],
        "data.train.columns: 'promt' is not a field of a row; did you mean 'prompt'?",
    ),
    "benchmark called train": (
        ["--data.evaluation={train: {files: {dir}/kind.jsonl}}"],
        "data.evaluation: 'train' cannot name an evaluation set",
    ),
    "rank above a matrix": (
        ["--model.lora.rank=9"],
        "model.lora.rank = 9 exceeds the smaller side of key, which is 16 x 8; lower it or",
    ),
    "no targets": (["--model.lora.targets=[]"], "model.lora.targets = [] must name matrices"),
    "adapters of nothing": (["--export.lora=adapter"], "adapter needs model.lora, which is not"),
    "hub without a name": (
        ["--data.evaluation.ood={hub: {name: ''}}", "--data.evaluation.ood.procedural=null"],
        "data.evaluation.ood.hub.name is empty",
    ),
    "missing JSONL": (jsonl("none"), "{dir}/none.jsonl cannot be read"),
    "malformed row": (jsonl("malformed"), "{dir}/malformed.jsonl, row 2: not JSON"),
    "row without prompt": (jsonl("promptless"), "{dir}/promptless.jsonl, row 2: 'prompt' is"),
    "row without answer": (jsonl("answerless"), "{dir}/answerless.jsonl, row 2: 'answer' is"),
    "misspelt field": (jsonl("misspelt"), "row 2: unknown field 'demonstratoins'; did you mean"),
    "misspelt verifier": (
        [*jsonl("kind"), "--data.prompts_per_step=1"],
        "{dir}/kind.jsonl, row 2: unknown reward kind 'final_anwser'",
    ),
    "gold that no verifier reads": (
        [*jsonl("gold"), "--data.prompts_per_step=1"],
        "error: {dir}/gold.jsonl, row 2: kind numeric: gold 'five' is not a number.\n",
    ),
    "demonstration too long": (
        jsonl("long"),
        "row 2: demonstration 1 has 17 tokens, but data.max_demonstration_tokens is 16",
    ),
    "nothing left": (
        ["--data.max_prompt_tokens=8", "--data.too_long=drop"],
        "ood: no prompt fits, so nothing is left of the set",
    ),
    "prompt too long": (jsonl("long_prompt"), "but data.max_prompt_tokens is 12"),
    "more prompts than there are": (["--data.prompts_per_step=41"], "exceeds the 40 prompts"),
    "more problems than there are": (
        ["--data.evaluation.held_out.procedural.count=9999"],
        "9999 problems",
    ),
    "no demonstrations": (
        ["--objective.preset=sft", "--data.train.procedural.demonstrated=0"],
        "objective.preset = sft trains on demonstrations, but no training prompt has one",
    ),
    "group of one": (
        ["--objective.preset=grpo", "--rollout.completions_per_prompt=1"],
        "rollout.completions_per_prompt = 1 with objective.prefix = none leaves one completion",
    ),
    "one completion beside the prefixed one": (
        [
            "--objective.preset=prefix_rft",
            "--objective.advantage_std=true",
            "--rollout.completions_per_prompt=2",
        ],
        "rollout.completions_per_prompt = 2 with objective.prefix = one leaves one completion",
    ),
    "nothing to train": (
        ["--objective.preset=sft", "--objective.demo_nll=0"],
        "the objective trains nothing",
    ),
    "clip bounds": (["--objective.clip_low=1.5"], "objective.clip_low = 1.5"),
    "no demonstrations for a first stage": (
        ["--objective.preset=grpo", "--objective.sft_steps=2", NO_DEMONSTRATIONS],
        "objective.preset = grpo trains on demonstrations, but no training prompt has one",
    ),
    "no demonstrations for prefixes": (
        ["--objective.preset=prefix_rft", NO_DEMONSTRATIONS],
        "objective.preset = prefix_rft trains on demonstrations, but no training prompt has one",
    ),
    "few demonstrations for a first stage": (
        ["--objective.preset=sft_rl", "--objective.sft_steps=2", FEW_DEMONSTRATIONS],
        "data.prompts_per_step = 4 exceeds the 3 prompts that objective.preset = sft_rl can",
    ),
    "few demonstrations of their own": (
        ["--objective.preset=chord", "--objective.demo_per_step=21"],
        "objective.demo_per_step = 21 exceeds the 20 training prompts with a demonstration",
    ),
    "none of their own": (
        ["--objective.demo_policy=0", "--objective.demo_source=own"],
        "objective.demo_source = own needs objective.demo_per_step above 0",
    ),
    "policy gradient of lone demonstrations": (
        ["--objective.demo_source=own", "--objective.demo_per_step=4"],
        "objective.demo_policy = 1.0 needs the advantage of a demonstration in its prompt's group",
    ),
    "policy gradient of buffered demonstrations": (
        ["--objective.demo_buffer=4"],
        "objective.demo_buffer = 4 trains the demonstrations of prompts by likelihood",
    ),
    "no reference": (
        ["--objective.preset=sft_kl"],
        "objective.preset = sft_kl needs a reference policy for its KL (objective.kl = 0.2)",
    ),
    "missing reference": (
        ["--objective.preset=uft", "--model.reference={dir}/none"],
        "{dir}/none is not a directory",
    ),
    "another architecture": (
        ["--objective.preset=uft", "--model.reference={dir}/reference"],
        "{dir}/reference has dim = 32 (the policy has 16), num_heads = 4 (the policy has 2)",
    ),
    "everything passes the gate": (
        ["--objective.preset=hpt", "--objective.gate_solved=3"],
        "objective.gate_solved = 3 lets every group of rollout.completions_per_prompt = 3 pass",
    ),
    "a gate without rollouts": (
        ["--objective.preset=sft", "--objective.gate=either"],
        "objective.gate = either chooses demonstrations by correct completions",
    ),
    "nobody without a prefix": (
        ["--objective.preset=prefix_rft", "--rollout.completions_per_prompt=1"],
        "leaves none of rollout.completions_per_prompt = 1 without a prefix",
    ),
    "hints without prefixes": (
        ["--objective.hint_nll=0.1"],
        "objective.hint_nll = 0.1 trains prefixes, but objective.prefix = none",
    ),
    "a first stage without end": (
        ["--objective.preset=sft_rl"],
        "objective.sft_steps = 100 leaves none of training.num_steps = 6 to the objective",
    ),
    "nothing to drop": (
        ["--objective.preset=sft", "--objective.drop_zero_std=true"],
        "objective.drop_zero_std needs completions",
    ),
    "the other optimizer": (
        ["--training.demonstration_optimizer.b1=1"],
        "training.demonstration_optimizer.b1 = 1.0 is not in [0, 1)",
    ),
    "no logits": (["--training.logits_mib=0"], "training.logits_mib = 0 is not at least 1"),
    "never skipping": (["--training.max_skipped=0"], "training.max_skipped = 0 is not at least 1"),
    "rows too short": (["--training.row_length=26"], "27 tokens, which do not fit"),
    "rows too short for demonstrations": (
        ["--data.max_demonstration_tokens=24"],
        "data.max_demonstration_tokens = 24 make sequences of up to 35 tokens, which do not fit",
    ),
    "demonstrations longer than the model's positions": (
        ["--data.max_demonstration_tokens=24", "--training.row_length=64", POSITIONS],
        "prompt and completion of up to 36 tokens exceed the model's 30",
    ),
    "prefixes longer than completions": (
        ["--objective.preset=uft", "--data.max_demonstration_tokens=17"],
        "objective.prefix = all starts completions of up to rollout.max_new_tokens = 16",
    ),
    "uneven updates": (
        ["--training.updates_per_rollout=3"],
        "data.prompts_per_step = 4 does not split into training.updates_per_rollout = 3",
    ),
    "mesh above the devices": (["--mesh.fsdp=3"], "fsdp=3 x context=1 x tensor=1 does not fit"),
    "mesh above the devices, before any row is read": (
        ["--mesh.fsdp=3", *jsonl("none")],
        "fsdp=3 x context=1 x tensor=1 does not fit",
    ),
    "mesh of nothing": (["--mesh.tensor=0"], "mesh.tensor = 0 is below 1"),
    "temperature 0": (["--rollout.temperature=0"], "rollout.temperature = 0.0 is not above 0"),
    "a stop string that is empty": (
        ["--rollout.stop_strings=['']"],
        "rollout.stop_strings holds an empty text",
    ),
    "a stop string that is a stop token": (
        ["--rollout.stop_strings=['<|end|>']"],
        "'<|end|>' holds the special token '<|end|>', which decoding drops, so it would never be "
        "found: leave it out, as this token ends completions anyway",
    ),
    "a stop string with another special token": (
        ["--rollout.stop_strings=['Bye', 'x<|user|>']"],
        "'x<|user|>' holds the special token '<|user|>', which decoding drops, so it would never "
        "be found: add its id, 2, to eos_token_id in the generation_config.json beside",
    ),
    "top-p": (["--generate.top_p=1.5"], "generate.top_p must be above 0 and at most 1"),
    "copy over more than there is": (
        ["--rollout.tensor=2"],
        "rollout.tensor = 2 does not divide the 1 devices of a process",
    ),
    "no cache": (["--rollout.cache_mib=0"], "rollout.cache_mib = 0 is not at least 1"),
    "temperature NaN": (["--rollout.temperature=.nan"], "rollout.temperature = nan is not above 0"),
    "no steps": (["--training.num_steps=0"], "training.num_steps = 0 is not at least 1"),
    "negative seed": (["--seed=-1"], "seed = -1 is not at least 0"),
    "negative rate": (["--training.optimizer.learning_rate=-1"], "learning_rate = -1.0 is not at"),
    "impossible moment": (["--training.optimizer.b2=1"], "b2 = 1.0 is not in [0, 1)"),
    "no number to be correct from": (
        ["--rewards.correct_threshold=.nan"],
        "rewards.correct_threshold = nan is not finite",
    ),
    "time to search below 0": (["--plan.search_seconds=-1"], "plan.search_seconds = -1 is not at"),
    "no time to verify": (
        ["--rewards.timeout_seconds=0"],
        "rewards.timeout_seconds = 0.0 is not above 0",
    ),
    "checkpoints is a file": (["--run_dir={dir}/file_run"], "checkpoints cannot be made"),
    "checkpoints holds other things": (["--run_dir={dir}/other_run"], "holds no checkpoint, but 1"),
    "run_dir is a file": (["--run_dir={dir}/malformed.jsonl"], "cannot be made"),
}

OTHER_VERBS = {
    "unknown verb": (["fit"], "unknown verb 'fit'; the verbs are train, evaluate"),
    "evaluate before training": (["evaluate"], "{dir}/run has no checkpoint yet; train first"),
    "export before training": (["export"], "{dir}/run/model is not there, which a run makes"),
    "generate before training": (["generate"], "{dir}/run has no checkpoint yet; train first"),
    "report before training": (["report"], "there is no run to report on"),
    "nothing to evaluate": (
        ["evaluate", *NO_EVALUATION],
        "there is nothing to evaluate",
    ),
    "unknown set to inspect": (
        ["inspect", "--inspect.set=test"],
        "inspect.set = test is none of train, held_out, ood",
    ),
    "no rows to inspect": (["inspect", "--inspect.rows=0"], "inspect.rows = 0 is not at least 1"),
    "nothing to generate": (
        ["generate", "--data.evaluation={}"],
        "set generate.prompt",
    ),
}


@pytest.fixture
def directory(tmp_path):
    """With the files that the cases name."""
    for name, row in FILES.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{GOOD}\n{row}\n{GOOD.replace('1+2', '2+2')}\n")
    (tmp_path / "unknown.yaml").write_text("training: {nonsense: 1}\n")
    (tmp_path / "file_run").mkdir()
    (tmp_path / "file_run" / "checkpoints").write_text("")
    (tmp_path / "other_run" / "checkpoints" / "mine").mkdir(parents=True)
    changed_architecture(tmp_path / "reference", dim=32, num_heads=4, init_std=0.1)
    changed_architecture(tmp_path / "small_vocabulary", vocab_size=100)
    changed_architecture(tmp_path / "three_kv_heads", num_kv_heads=3)
    changed_architecture(tmp_path / "no_heads", num_kv_heads=0)
    return tmp_path


@pytest.fixture
def compilations():
    """Grows with everything that JAX compiles."""
    events = []

    def listen(event, seconds, **_):
        if "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def command_line(directory, verb, arguments):
    added = [argument.replace("{dir}", str(directory)) for argument in arguments]
    return [verb, *tiny_arguments(directory / "run", *added)]


def assert_refused(code, out, err, message, directory):
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message.replace("{dir}", str(directory)) in err


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES)
def test_a_mistake_in_the_configuration(arguments, message, directory, compilations, capsys):
    code = run.main(command_line(directory, "train", arguments))
    assert_refused(code, *capsys.readouterr(), message, directory)
    assert not compilations
    assert not (directory / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 8, 2, 1), "training.rows_per_microbatch = 8 does not split over the 16 data-parallel"),
        (
            (1, 2, 3, 1),
            "training.row_length = 32 does not split into the 6 chunks that mesh.context = 3",
        ),
    ],
)
def test_rows_that_a_mesh_cannot_split(sizes, message, directory):
    mesh = Mesh(np.full(sizes, jax.devices()[0]), AXES)
    setup = prepare(parse(command_line(directory, "train", [])[1:])[1])
    check_sizes(setup.config, setup.model_config, setup.mesh)
    with pytest.raises(UsageError, match=re.escape(message)):
        check_sizes(setup.config, setup.model_config, mesh)


@pytest.mark.parametrize(("arguments", "message"), OTHER_VERBS.values(), ids=OTHER_VERBS)
def test_a_mistake_with_another_verb(arguments, message, directory, compilations, capsys):
    verb, *added = arguments
    code = run.main(command_line(directory, verb, added))
    assert_refused(code, *capsys.readouterr(), message, directory)
    assert not compilations
    assert not (directory / "run").exists()  # nothing is written where a run is only read


def test_the_listener_would_have_heard_a_compilation(compilations):
    jax.jit(lambda x: x + len(compilations))(1.0)
    assert compilations


@pytest.mark.parametrize("case", ["unknown key", "malformed row"])
def test_a_mistake_at_the_command_line(case, directory, command):
    """With compilations logged: stderr would have a second line."""
    arguments, message = CASES[case]
    line = command_line(directory, "train", arguments)
    assert_refused(*command(*line, JAX_LOG_COMPILES="1"), message, directory)


def test_a_bug_is_not_taken_for_a_mistake(directory, monkeypatch):
    """Only UsageError becomes one line; anything else keeps its traceback."""

    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(begin, "all_demonstrations", broken)
    with pytest.raises(ValueError, match="a bug") as caught:
        run.main(command_line(directory, "train", []))
    assert not isinstance(caught.value, UsageError)


def test_activations_wait_only_where_the_platform_has_room_for_them(tmp_path):
    arguments = tiny_arguments(tmp_path / "run", "--model.remat=offload")
    mesh = prepare(parse(arguments)[1]).mesh
    check_offload("offload", mesh)
    check_offload("block", mesh, host_memory="shelf")
    with pytest.raises(UsageError, match="model.remat = offload needs shelf memory, but a cpu dev"):
        check_offload("offload", mesh, host_memory="shelf")
