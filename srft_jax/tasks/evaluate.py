"""Verb `evaluate`: greedy pass@1 of the newest checkpoint, held-out and out of distribution."""

import json
import sys

import jax

from srft_jax.config import RunConfig, UsageError
from srft_jax.evaluation import scores
from srft_jax.report.summary import rollout_observer
from srft_jax.report.terminal import ProgressLine, table
from srft_jax.setup.prepare import prepare, reward_pool
from srft_jax.training.loading import load_policy


def evaluate(config: RunConfig) -> int:
    """Prints a table, then the same as one JSON line."""
    setup = prepare(config)
    if not any(examples for examples, _ in setup.evaluation_sets.values()):
        raise UsageError("there is nothing to evaluate: the held-out and ood sets are both empty")
    params = load_policy(config.run_dir, config.model, setup.model_config, setup.mesh, config.seed)
    with (
        jax.set_mesh(setup.mesh),
        reward_pool(setup) as pool,
        ProgressLine(stream=sys.stderr) as progress,
    ):
        shown = rollout_observer(progress, "evaluation")
        values, _ = scores.evaluate(
            params,
            setup.model_config,
            setup.evaluation_sets,
            setup.tokenizer,
            pool,
            setup.evaluation_sampling,
            threshold=config.rewards.correct_threshold,
            observer=shown if jax.process_index() == 0 else None,
        )
    rows = [
        [
            name,
            len(examples),
            f"{values[f'eval/{name}/pass@1']:.1%}",
            f"{values[f'eval/{name}/length']:.1f}",
        ]
        for name, (examples, _) in setup.evaluation_sets.items()
        if examples
    ]
    print(table(["set", "problems", "pass@1", "mean length"], rows))
    print(json.dumps(values))
    return 0
