"""The section `model.lora`."""

import dataclasses
from typing import Literal, get_args

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: y = x W + alpha / rank (x A) B, where A and B are trained and W is not.

    Everything but the adapters is frozen: embedding, head, norms and biases too. Without
    `model.reference` the model without its adapters is the reference policy. A good learning rate
    is about ten times the one for training all parameters, and hardly depends on the rank.

    Args:
        rank: Columns of A and rows of B, r; at most the smaller side of each target.
        alpha: Numerator of the factor alpha / rank.
        targets: Matrices of each block that have an adapter; by default all of them.
        base_dtype: Type of the frozen parameters in memory. bfloat16 takes half the memory, and
            loses nothing where they are stored in bfloat16.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[Target, ...] = get_args(Target)
    base_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def scale(self) -> float:
        """Factor of the product (x A) B."""
        return self.alpha / self.rank
