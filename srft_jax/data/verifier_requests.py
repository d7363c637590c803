"""What rows of data ask of verifiers: when a run starts, and for each completion."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from srft_jax.config import ShapingConfig
from srft_jax.data.examples import Example, row_name
from srft_jax.rewards import RewardRequest
from srft_jax.rewards.verifiers import columns_of, row_problem

PROBED_ROWS = 3  # rows of each kind and set that verifiers are tried on when a run starts


def verifier_requests(
    example: Example, text: str, num_tokens: int, shaping: Sequence[ShapingConfig]
) -> list[RewardRequest]:
    """Return a request for the example's own verifier, then one for each term of the shaping.

    Args:
        example: Row with the gold answer.
        text: Completion to be verified.
        num_tokens: Tokens of the completion.
        shaping: Terms added to the reward, each with a verifier of its own.
    """
    columns = {"prompt": example.prompt, **example.metadata, "num_tokens": num_tokens}
    verifiers = [(example.kind, columns)]
    verifiers += [(term.kind, columns | term.options) for term in shaping]
    return [
        RewardRequest(kind, text, example.answer, metadata, example.where)
        for kind, metadata in verifiers
    ]


def probes(
    sets: Mapping[str, Sequence[Example]], shaping: Sequence[ShapingConfig]
) -> list[RewardRequest]:
    """Return requests to try verifiers on: the first rows of each kind in each set.

    The completion is the row's first demonstration; without one, it is the gold answer.
    """
    requests = []
    for name, examples in sets.items():
        seen: Counter[str] = Counter()
        for row, example in enumerate(examples, start=1):
            seen[example.kind] += 1
            if seen[example.kind] <= PROBED_ROWS:
                text, *_ = (*example.demonstrations, f"<think>\n</think>\n{example.answer}")
                placed = dataclasses.replace(example, where=row_name(example, name, row))
                requests += verifier_requests(placed, text, len(text), shaping)
    return requests


def row_problems(
    sets: Mapping[str, Sequence[Example]],
    shaping: Sequence[ShapingConfig],
    options: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Yield a sentence for each row whose kind, gold answer or options no verifier could take."""
    for name, examples in sets.items():
        for row, example in enumerate(examples, start=1):
            for request in verifier_requests(example, "", 0, shaping if name == "train" else ()):
                kind = request.kind
                columns = columns_of(kind, request.metadata, options.get(kind, {}))
                if problem := row_problem(kind, request.gold, columns):
                    yield f"{row_name(example, name, row)}: {problem}"
