"""Makes the small JSONL data set that ships with the repository: python -m assets.make_jsonl

    arithmetic.jsonl            600 chains of 4 terms, the first 100 with a demonstration
    arithmetic_held_out.jsonl   512 other chains of 4 terms
    arithmetic_ood.jsonl        256 chains of 5 or 6 terms

The problems are those of data/procedural/ with a seed of their own.
"""

import json
import pathlib

from srft_jax.config import ProceduralConfig
from srft_jax.data import procedural
from srft_jax.data.examples import Example

# File -> its problems and the set that they are of.
FILES = {
    "arithmetic.jsonl": (
        ProceduralConfig(seed=2506, count=600, demonstrated=100, min_size=4, max_size=4),
        "train",
    ),
    "arithmetic_held_out.jsonl": (
        ProceduralConfig(seed=2506, count=512, min_size=4, max_size=4),
        "held_out",
    ),
    "arithmetic_ood.jsonl": (
        ProceduralConfig(seed=2506, count=256, min_size=5, max_size=6),
        "ood",
    ),
}


def contents() -> dict[str, str]:
    """File name -> text."""
    return {
        name: "".join(map(to_line, procedural.load_procedural(config, set_name)))
        for name, (config, set_name) in FILES.items()
    }


def to_line(example: Example) -> str:
    row: dict[str, object] = {"prompt": example.prompt, "answer": example.answer}
    if example.demonstrations:
        row["demonstrations"] = example.demonstrations
    return json.dumps(row) + "\n"


if __name__ == "__main__":
    for name, text in contents().items():
        pathlib.Path(__file__).with_name(name).write_text(text, encoding="utf-8")
