"""Verb `generate`: completions of the newest checkpoint, to be read."""

import jax

from srft_jax.config import RunConfig, UsageError
from srft_jax.data.encoding import encode
from srft_jax.data.examples import Example
from srft_jax.experience.verdicts import completion_text
from srft_jax.rollout import Request, Truncation, sample
from srft_jax.setup.prepare import prepare
from srft_jax.training.loading import load_policy


def generate(config: RunConfig) -> int:
    """Prints each prompt and its completions."""
    setup = prepare(config)
    wanted = config.generate
    examples = setup.sets.evaluation.get("held_out", ())[: wanted.num_prompts]
    if wanted.prompt is not None:
        examples = (Example(wanted.prompt, answer=""),)
    if not examples:
        raise UsageError("there is no held-out set to take prompts from; set generate.prompt")
    if jax.process_index() != 0:
        examples = ()  # the others decode along
    params = load_policy(config.run_dir, config.model, setup.model_config, setup.mesh, config.seed)
    sampling = setup.sampling(
        temperature=wanted.temperature,
        truncation=Truncation(wanted.top_k, wanted.top_p, wanted.min_p),
        max_new_tokens=config.evaluation.max_new_tokens,
        slots=config.evaluation.slots,
    )
    tokenizer = setup.tokenizer
    requests = [
        Request(one.prompt, wanted.completions, stop_ids=tokenizer.stop_ids)
        for one in encode(examples, tokenizer, system_prompt=config.data.system_prompt)
    ]
    key = jax.random.key(config.seed)
    with jax.set_mesh(setup.mesh):
        groups = sample(params, setup.model_config, requests, key, sampling)
    for example, group in zip(examples, groups, strict=True):
        print(example.prompt)
        for completion in group:
            text = completion_text(tokenizer, completion.tokens.tolist())
            cut = "" if completion.finished else " [cut]"
            print("    " + text.replace("\n", "\n    ") + cut)
    return 0
