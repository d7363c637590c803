"""A batch looked at: loss terms, and the sequences that are broken or weigh the most, in text."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from srft_jax.batch import Role, Rows
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.report.terminal import table

# Sequences that are shown: so many broken ones, or else so many of the largest loss.
MOST_SHOWN, LARGEST_SHOWN = 20, 5


class MicrobatchTerms(NamedTuple):
    """Tokens [B, T], their log-probs, and the loss's terms by name."""

    rows: Rows
    logprob: Array
    terms: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """A sequence of the batch: ids up to its first trained token and from there on, loss of all
    terms, and what the table shows of it."""

    prompt: list[int]
    completion: list[int]
    loss: float
    facts: dict[str, str]


def terms_table(microbatches: Sequence[MicrobatchTerms], gradient_norms: Mapping[str, Any]) -> str:
    """Return each loss term's sum and the norm of its gradient."""
    rows = [
        [name, _number(_total(microbatches, name)), _number(norm)]
        for name in microbatches[0].terms
        for norm in [gradient_norms[f"loss/{name}_gradient_norm"]]
    ]
    return table(["term", "loss", "gradient norm"], rows)


def _total(microbatches: Sequence[MicrobatchTerms], term: str) -> float:
    return float(sum(np.sum(one.terms[term]) for one in microbatches))


def _number(value: Any) -> str:
    return f"{float(value):.4g}"


def _sequences(microbatch: MicrobatchTerms) -> Iterator[_Sequence]:
    """The microbatch's sequences that have trained tokens."""
    rows, logprob, terms = microbatch
    loss = sum(terms.values(), start=np.zeros_like(logprob))
    for number in np.unique(rows.sequence_ids):
        inside = (rows.segment_ids > 0) & (rows.sequence_ids == number)
        trained = inside & rows.loss_mask
        if not trained.any():
            continue
        start = int(np.argmax(rows.loss_mask[inside]))
        log_ratio = logprob[trained] - rows.old_logprobs[trained]
        facts = {
            "role": Role(int(rows.role[trained][-1])).name.lower(),
            "advantage": _number(rows.advantage[trained][0]),
            "loss": _number(loss[inside].sum()),
            "min logprob": _number(logprob[trained].min()),
            "max logprob": _number(logprob[trained].max()),
            "max ratio": _number(np.exp(log_ratio.max())),
        }
        yield _Sequence(
            prompt=rows.tokens[inside][: start + 1].tolist(),
            completion=rows.targets[inside][start:].tolist(),
            loss=float(loss[inside].sum()),
            facts=facts,
        )


def sequences_text(microbatches: Sequence[MicrobatchTerms], tokenizer: Tokenizer) -> str:
    """Return a table of the sequences to look at, and their text."""
    sequences = [sequence for part in microbatches for sequence in _sequences(part)]
    broken = [one for one in sequences if not np.isfinite(one.loss)]
    shown = broken[:MOST_SHOWN]
    title = f"{len(broken)} of {len(sequences)} sequences have a loss that is not finite"
    if not broken:
        shown = sorted(sequences, key=lambda one: -abs(one.loss))[:LARGEST_SHOWN]
        title = f"the loss of all {len(sequences)} sequences is finite; the largest are"
    facts = [[f"{number}", *one.facts.values()] for number, one in enumerate(shown, start=1)]
    texts = [
        f"{number}  {_text(one.prompt, tokenizer)}\n   {_text(one.completion, tokenizer)}"
        for number, one in enumerate(shown, start=1)
    ]
    return "\n".join([title, "", table(["", *shown[0].facts], facts), "", *texts])


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids).strip().replace("\n", "\n   ")
