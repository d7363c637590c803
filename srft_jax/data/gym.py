"""Problems of reasoning-gym."""

from srft_jax.config import GymConfig, UsageError
from srft_jax.data.examples import Example


def load(config: GymConfig, set_name: str) -> tuple[Example, ...]:
    """The problems of one set: train, held_out, ood, or a benchmark's name."""
    raise UsageError(
        f"reasoning-gym's {config.dataset} for {set_name}: pip install 'srft_jax[gym]'"
    )
