"""Makes the small JSONL data set that ships with the repository: python -m assets.make_jsonl

    arithmetic.jsonl            600 chains of 4 to 6 terms, the first 100 with a demonstration
    arithmetic_held_out.jsonl   512 other chains of 4 to 6 terms
    arithmetic_ood.jsonl        256 chains of 7 or 8 terms

The problems are those of data/arithmetic.py with a seed of their own.
"""

import json
import pathlib

from srft_jax.config import ArithmeticConfig
from srft_jax.data.arithmetic import make_sets
from srft_jax.data.examples import Example

CONFIG = ArithmeticConfig(
    seed=2506,
    num_train=600,
    num_demonstrated=100,
    num_held_out=512,
    num_ood=256,
)


def contents() -> dict[str, str]:
    """File name -> text."""
    sets = make_sets(CONFIG)
    return {
        "arithmetic.jsonl": "".join(map(to_line, sets.train)),
        "arithmetic_held_out.jsonl": "".join(map(to_line, sets.held_out)),
        "arithmetic_ood.jsonl": "".join(map(to_line, sets.ood)),
    }


def to_line(example: Example) -> str:
    row: dict[str, object] = {"prompt": example.prompt, "answer": example.answer}
    if example.demonstrations:
        row["demonstrations"] = example.demonstrations
    return json.dumps(row) + "\n"


if __name__ == "__main__":
    for name, text in contents().items():
        pathlib.Path(__file__).with_name(name).write_text(text, encoding="utf-8")
