"""What a user starts, by verb: each takes the run's configuration and returns an exit code."""

from collections.abc import Callable

from srft_jax.config import RunConfig
from srft_jax.tasks.evaluate import evaluate
from srft_jax.tasks.export import export
from srft_jax.tasks.generate import generate
from srft_jax.tasks.report import report
from srft_jax.tasks.train import train

VERBS: dict[str, Callable[[RunConfig], int]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "report": report,
}
