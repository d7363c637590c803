"""Verb `evaluate`: greedy pass@1 of the newest checkpoint on every evaluation set."""

import json
import sys

import jax

from srft_jax.config import RunConfig, UsageError
from srft_jax.evaluation import scores
from srft_jax.experience.scoring import Scorer
from srft_jax.report.summary import rollout_observer, scores_table
from srft_jax.report.terminal import ProgressLine
from srft_jax.rollout import Sampler
from srft_jax.setup.prepare import prepare, reward_pool
from srft_jax.training.loading import load_policy


def evaluate(config: RunConfig) -> int:
    """Print a table, then the same as one JSON line."""
    setup = prepare(config)
    sets = setup.data.evaluation
    if not any(sets.values()):
        raise UsageError(
            "there is nothing to evaluate: data.evaluation names no set that holds a problem"
        )
    sampler = Sampler(setup.model_config, setup.sampling, setup.mesh, tokenizer=setup.tokenizer)
    sampler.update(
        load_policy(config.run_dir, config.model, setup.model_config, setup.mesh, config.seed)
    )
    with (
        jax.set_mesh(setup.mesh),
        reward_pool(setup.data, setup.config.rewards) as pool,
        ProgressLine(stream=sys.stderr) as progress,
    ):
        observer = rollout_observer(progress, "evaluation")
        values, _ = scores.evaluate(
            sampler,
            sets,
            Scorer(pool, setup.tokenizer, threshold=config.rewards.correct_threshold),
            stop_ids=setup.tokenizer.stop_ids,
            stop_strings=tuple(config.rollout.stop_strings),
            max_new_tokens=config.evaluation.max_new_tokens,
            slots=config.evaluation.slots,
            observer=observer if jax.process_index() == 0 else None,
        )
    print(scores_table(values, {name: len(problems) for name, problems in sets.items()}))
    print(json.dumps(values))
    return 0
