"""The data as the model sees it, in text: sets, lengths, the prompt's form, packed rows.

On a terminal, what is trained is green, what is not is dim, and special tokens are bold. Elsewhere
what is trained stands between « and »:

    <|user|>7+5*3-4<|assistant|>«<think>2 6 2</think>2<|end|>»
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import shorten

import jax
import numpy as np

from srft_jax.batch import Role
from srft_jax.config import Objective, TrainingConfig
from srft_jax.data.encoding import EncodedExample, EncodedSets, conversation
from srft_jax.data.examples import Example, row_name
from srft_jax.experience.demonstrations import given_trajectory
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.objectives.rows import TrainingSequence, make_batch, max_microbatches, pack
from srft_jax.report.terminal import Style, styled, table

_PERCENTILES = (50, 90, 99)


def sets_table(data: EncodedSets) -> str:
    """Return how many rows each set has, and how many were too long."""
    rows = []
    for name, dropped in data.dropped.items():
        demonstrations = [len(problem.demonstrations) for problem in data.named(name)]
        counts = [len(demonstrations), np.count_nonzero(demonstrations), sum(demonstrations)]
        rows.append([name, *counts, dropped.prompts, dropped.demonstrations, dropped.bare])
    sources = Counter(problem.example.source for problem in data.train)
    if len(sources) > 1:
        rows[1:1] = [
            [f"  data.mixture[{number}]", count, "", "", "", "", ""]
            for number, count in sorted(sources.items())
        ]
    kept = ["rows", "demonstrated", "demonstrations"]
    return table(
        [
            "set",
            *kept,
            "prompts too long",
            "demonstrations too long",
            "left without a demonstration",
        ],
        rows,
    )


def lengths_table(data: EncodedSets, *, most_prompt: int, most_demonstration: int) -> str:
    """Return lengths of what is kept, in tokens, EOS included, beside their limits."""
    rows = []
    for name in data.dropped:
        prompts = [len(problem.prompt) for problem in data.named(name)]
        demonstrations = [
            len(tokens) for problem in data.named(name) for tokens in problem.demonstrations
        ]
        kinds = [
            ("prompts", prompts, most_prompt),
            ("demonstrations", demonstrations, most_demonstration),
        ]
        rows += [
            [f"{name}, {kind}", *np.percentile(sizes, _PERCENTILES).round(), max(sizes), limit]
            for kind, sizes, limit in kinds
            if sizes
        ]
    cells = [[row[0], *(f"{number:,.0f}" for number in row[1:])] for row in rows]
    return table(["tokens", *(f"{p}%" for p in _PERCENTILES), "longest", "limit"], cells)


def packing_lines(train: Sequence[EncodedExample], row_length: int) -> Iterator[str]:
    """Say how full rows are of all demonstrations together, one of each prompt."""
    sizes = [sequence.num_inputs for _, sequence in _first_demonstrations(train, len(train))]
    if sizes:
        num_rows = len(pack(sizes, row_length))
        yield (
            f"all {len(sizes):,} prompts with their first demonstration pack into {num_rows:,} "
            f"rows of {row_length:,} tokens, {sum(sizes) / (num_rows * row_length):.1%} full"
        )


def prompt_form(tokenizer: Tokenizer, system_prompt: str | None) -> str:
    """Return the form of a prompt that has no turns of its own before it."""
    turns = conversation(Example("{prompt}", answer=""), system_prompt)
    text = tokenizer.spell(tokenizer.encode_prompts([turns])[0])
    padding = tokenizer.spell([tokenizer.pad_id])
    if not tokenizer.has_padding:
        padding += ", its EOS, as the tokenizer has no padding token (masks never look at it)"
    return f"form of a prompt; padding is {padding}:\n{_indented(text)}"


def _first_demonstrations(
    train: Sequence[EncodedExample], most: int
) -> list[tuple[int, TrainingSequence]]:
    """Number and first demonstration of the first `most` training prompts that have any."""
    demonstrated = (index for index, problem in enumerate(train) if problem.demonstrations)
    return [
        (
            index,
            TrainingSequence(
                train[index].prompt, given_trajectory(train[index], 0), Role.DEMONSTRATION
            ),
        )
        for index in itertools.islice(demonstrated, most)
    ]


def prompts_shown(
    name: str,
    problems: Sequence[EncodedExample],
    tokenizer: Tokenizer,
    *,
    with_ids: bool,
    colours: bool,
) -> Iterator[str]:
    """Show prompts of a set, which nothing is known to follow."""
    for number, problem in enumerate(problems):
        title = _title(name, number, problem.example)
        head = f"{title}: a prompt of {len(problem.prompt)} tokens, to be completed"
        untrained = np.zeros(len(problem.prompt), bool)
        shown = _shown(tokenizer, problem.prompt, untrained, with_ids=with_ids, colours=colours)
        yield head + "\n" + shown


def packed_rows_shown(
    train: Sequence[EncodedExample],
    tokenizer: Tokenizer,
    objective: Objective,
    training: TrainingConfig,
    *,
    prompts_per_step: int,
    longest_sequence: int,
    most_rows: int,
    with_ids: bool,
    colours: bool,
) -> Iterator[str]:
    """Show packed rows as `make_batch` makes them of the first demonstrations of a step."""
    numbered = _first_demonstrations(train, prompts_per_step)
    sequences = [sequence for _, sequence in numbered]
    batch = make_batch(
        sequences,
        objective,
        training,
        num_microbatches=max_microbatches(len(sequences), longest_sequence, training),
        length_cap=longest_sequence,  # of normalisers, which are not shown
    )
    yield f"what is trained {'is green' if colours else 'stands between « and »'}"
    packed = pack([sequence.num_inputs for sequence in sequences], training.row_length)
    for number, members in enumerate(packed[:most_rows]):
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[number], batch.rows)  # noqa: B023
        used, trained = np.count_nonzero(rows.segment_ids), np.count_nonzero(rows.loss_mask)
        yield (
            f"packed row {number + 1}: {len(members)} sequences, {used:,} of "
            f"{training.row_length:,} tokens ({used / training.row_length:.1%} full), "
            f"{trained:,} trained"
        )
        for segment, member in enumerate(members, start=1):
            index, sequence = numbered[member]
            inside = rows.segment_ids == segment
            # The last token is a target only, the first one is never a target.
            tokens = np.append(rows.tokens[inside], rows.targets[inside][-1])
            mask = np.append(False, rows.loss_mask[inside])
            head = (
                f"{_title('train', index, train[index].example)}: a prompt of "
                f"{len(sequence.prompt)} tokens, a demonstration of "
                f"{len(sequence.trajectory.tokens)}"
            )
            shown = _shown(tokenizer, tokens, mask, with_ids=with_ids, colours=colours)
            yield head + "\n" + shown


def _title(name: str, index: int, example: Example) -> str:
    """Where a row stands, what is right there and who says so."""
    where = row_name(example, name, index + 1)
    return f"{where} ({example.kind}, answer {shorten(example.answer, 80)!r})"


def _shown(
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    trained: np.ndarray,
    *,
    with_ids: bool,
    colours: bool,
) -> str:
    text = _indented(marked(tokenizer, tokens, trained, colours=colours))
    return text + "\n" + _indented(str(tokens.tolist())) if with_ids else text


def marked(tokenizer: Tokenizer, tokens: np.ndarray, trained: np.ndarray, *, colours: bool) -> str:
    """Return the tokens' text, trained tokens told apart; see the module's own text."""
    special = [token in tokenizer.special_ids for token in tokens.tolist()]
    parts = []
    for is_trained, run in itertools.groupby(range(len(tokens)), key=lambda i: bool(trained[i])):
        text = ""
        for is_special, same in itertools.groupby(run, key=lambda i: special[i]):
            piece = tokenizer.spell(tokens[list(same)].tolist())
            styles: list[Style] = ["green" if is_trained else "dim"]
            if is_special:
                styles.append("bold")
            text += styled(piece, *styles) if colours else piece
        parts.append(f"«{text}»" if is_trained and not colours else text)
    return "".join(parts)


def _indented(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")
