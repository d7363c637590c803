"""Verb `generate`: completions of the newest checkpoint, to be read."""

import dataclasses

import jax

from srft_jax.config import RunConfig, UsageError
from srft_jax.data.encoding import EncodedExample, encode
from srft_jax.data.examples import Example
from srft_jax.experience.scoring import answer_text
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.rollout import Request, sample
from srft_jax.setup.prepare import prepare
from srft_jax.training.loading import load_policy


def generate(config: RunConfig) -> int:
    """Print each prompt and its completions."""
    setup = prepare(config)
    config = setup.config
    problems = _problems(config, next(iter(setup.data.evaluation.values()), ()), setup.tokenizer)
    if jax.process_index() != 0:
        problems = ()  # other processes decode along
    section = config.generate
    sampling = dataclasses.replace(
        setup.sampling,
        temperature=section.temperature,
        truncation=section.truncation,
        max_new_tokens=config.evaluation.max_new_tokens,
        slots=config.evaluation.slots,
    )
    requests = [
        Request(
            problem.prompt,
            section.completions,
            stop_ids=setup.tokenizer.stop_ids,
            stop_strings=config.rollout.stop_strings,
        )
        for problem in problems
    ]
    params = load_policy(config.run_dir, config.model, setup.model_config, setup.mesh, config.seed)
    key = jax.random.key(config.seed)
    with jax.set_mesh(setup.mesh):
        groups = sample(
            params, setup.model_config, requests, key, sampling, tokenizer=setup.tokenizer
        )
    for problem, group in zip(problems, groups, strict=True):
        print(problem.example.prompt)
        for trajectory in group:
            text = answer_text(setup.tokenizer, trajectory.tokens.tolist())
            cut = "" if trajectory.finished else " [cut]"
            print("    " + text.replace("\n", "\n    ") + cut)
    return 0


def _problems(
    config: RunConfig, evaluated: tuple[EncodedExample, ...], tokenizer: Tokenizer
) -> tuple[EncodedExample, ...]:
    """The prompt that the configuration names, or the first ones of the first evaluation set."""
    if config.generate.prompt is not None:
        example = Example(config.generate.prompt, answer="")
        return encode([example], tokenizer, system_prompt=config.data.system_prompt)
    if not evaluated:
        raise UsageError("there is no evaluation set to take prompts from; set generate.prompt")
    return evaluated[: config.generate.num_prompts]
