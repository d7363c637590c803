"""Problems of the project's own, by family."""

from srft_jax.config import ProceduralConfig
from srft_jax.data.examples import Example
from srft_jax.data.procedural import chain


def load(config: ProceduralConfig, set_name: str) -> tuple[Example, ...]:
    """The problems of one set: train, held_out, ood, or a benchmark's name."""
    return chain.load(config, set_name)
