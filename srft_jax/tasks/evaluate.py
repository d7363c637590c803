"""Verb `evaluate`: greedy pass@1 of the newest checkpoint on every evaluation set."""

import json
import sys

import jax

from srft_jax.config import RunConfig, UsageError
from srft_jax.evaluation.scores import measure_pass_at_1
from srft_jax.report.summary import rollout_observer, scores_table
from srft_jax.report.terminal import ProgressLine
from srft_jax.rollout import Sampler
from srft_jax.setup.prepare import prepare, reward_pool
from srft_jax.tasks.begin import make_evaluations, make_scorer
from srft_jax.training.loading import load_policy


def evaluate(config: RunConfig) -> int:
    """Print a table, then the same as one JSON line."""
    setup = prepare(config)
    config, sets = setup.config, setup.data.evaluation
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
        reward_pool(setup.data, config.rewards) as pool,
        ProgressLine(stream=sys.stderr) as progress,
    ):
        observer = rollout_observer(progress, "evaluation") if jax.process_index() == 0 else None
        evaluations = make_evaluations(setup, make_scorer(setup, pool))
        values, _ = measure_pass_at_1(sampler, evaluations, observer)
    print(scores_table(values, {name: len(problems) for name, problems in sets.items()}))
    print(json.dumps(values))
    return 0
