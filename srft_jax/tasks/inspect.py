"""Verb `inspect`: the data as the model sees it, before any model is loaded.

On a terminal, what is trained is green, what is not is dim, and special tokens are bold. Elsewhere
what is trained stands between « and »:

    <|user|>7+5*3-4<|assistant|>«<think>2 6 2</think>2<|end|>»
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import shorten

import jax
import numpy as np

from srft_jax.batch import Role
from srft_jax.config import RunConfig, UsageError
from srft_jax.data.encoding import EncodedExample, conversation
from srft_jax.data.examples import Example, place
from srft_jax.experience.demonstrations import given_trajectory
from srft_jax.models import lora
from srft_jax.models.decoder import init_params
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.objectives.rows import TrainingSequence, make_batch, max_microbatches, pack
from srft_jax.planning.microbatch_size import with_rows
from srft_jax.report.terminal import Style, shows_colours, styled, table
from srft_jax.setup.prepare import Setup, prepare
from srft_jax.tasks.train import batch_arithmetic

_PERCENTILES = (50, 90, 99)


def inspect(config: RunConfig) -> int:
    """Prints batch arithmetic, sets, lengths, the prompt's form and the first rows of a set."""
    setup, _ = with_rows(prepare(config))
    names = ["train", *setup.data.evaluation]
    if config.inspect.set not in names:
        raise UsageError(f"inspect.set = {config.inspect.set} is none of {', '.join(names)}")
    architecture = setup.model_config
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    parts = [
        batch_arithmetic(
            setup, *(part(shapes, architecture) for part in (lora.frozen, lora.trained))
        ),
        _sets(setup),
        _lengths(setup),
        *_packing(setup),
        _template(setup),
        *_rows(setup, colours=shows_colours(sys.stdout)),
    ]
    print("\n\n".join(parts))
    return 0


def _problems(setup: Setup, name: str) -> Sequence[EncodedExample]:
    """The problems of a set."""
    return setup.data.train if name == "train" else setup.data.evaluation[name]


def _sets(setup: Setup) -> str:
    """How many rows there are, and how many were too long."""
    rows = []
    for name, dropped in setup.data.dropped.items():
        problems = _problems(setup, name)
        demonstrations = [len(problem.demonstrations) for problem in problems]
        counts = [len(problems), np.count_nonzero(demonstrations), sum(demonstrations)]
        rows.append([name, *counts, dropped.prompts, dropped.demonstrations, dropped.bare])
    sources = Counter(problem.example.source for problem in setup.data.train)
    if len(sources) > 1:
        rows[1:1] = [
            [f"  data.mixture[{number}]", count, "", "", "", "", ""]
            for number, count in sorted(sources.items())
        ]
    kept = ["rows", "demonstrated", "demonstrations"]
    return table(["set", *kept, "prompts too long", "demonstrations too long", "left bare"], rows)


def _lengths(setup: Setup) -> str:
    """In tokens, EOS included, of what is kept."""
    limits = setup.config.data.max_prompt_tokens, setup.config.max_demonstration_tokens
    rows = []
    for name in setup.data.dropped:
        problems = _problems(setup, name)
        prompts = [len(problem.prompt) for problem in problems]
        demonstrations = [len(tokens) for one in problems for tokens in one.demonstrations]
        kinds = [("prompts", prompts, limits[0]), ("demonstrations", demonstrations, limits[1])]
        rows += [
            [f"{name}, {kind}", *np.percentile(sizes, _PERCENTILES).round(), max(sizes), limit]
            for kind, sizes, limit in kinds
            if sizes
        ]
    cells = [[row[0], *(f"{number:,.0f}" for number in row[1:])] for row in rows]
    return table(["tokens", *(f"{p}%" for p in _PERCENTILES), "longest", "limit"], cells)


def _packing(setup: Setup) -> Iterator[str]:
    """How full the rows are of all demonstrations together, one of each example."""
    sequences = _demonstrations(setup, len(setup.data.train))
    if sequences:
        sizes = [sequence.num_inputs for _, sequence in sequences]
        row_length = setup.config.training.row_length
        num_rows = len(pack(sizes, row_length))
        yield (
            f"all {len(sizes):,} prompts with their first demonstration pack into {num_rows:,} "
            f"rows of {row_length:,} tokens, {sum(sizes) / (num_rows * row_length):.1%} full"
        )


def _template(setup: Setup) -> str:
    """The prompt's form, for an example without turns of its own before it."""
    tokenizer = setup.tokenizer
    turns = conversation(Example("{prompt}", answer=""), setup.config.data.system_prompt)
    text = tokenizer.spell(tokenizer.encode_prompts([turns])[0])
    padding = tokenizer.spell([tokenizer.pad_id])
    if not tokenizer.has_padding:
        padding += ", its EOS, as the tokenizer has no padding token (masks never look at it)"
    return f"form of a prompt; padding is {padding}:\n{_indented(text)}"


def _demonstrations(setup: Setup, most: int) -> list[tuple[int, TrainingSequence]]:
    """Index and first demonstration of the first `most` training examples that have any."""
    problems = setup.data.train
    demonstrated = (index for index, one in enumerate(problems) if one.demonstrations)
    return [
        (
            index,
            TrainingSequence(
                problems[index].prompt, given_trajectory(problems[index], 0), Role.DEMONSTRATION
            ),
        )
        for index in itertools.islice(demonstrated, most)
    ]


def _rows(setup: Setup, *, colours: bool) -> Iterator[str]:
    """Packed rows of demonstrations where they are trained on, prompts alone otherwise."""
    wanted = setup.config.inspect
    sequences = _demonstrations(setup, setup.config.data.prompts_per_step)
    if wanted.set == "train" and sequences and setup.objective.uses_demonstrations:
        yield from _packed_rows(setup, sequences, colours=colours)
        return
    for number, problem in enumerate(_problems(setup, wanted.set)[: wanted.rows]):
        title = _title(wanted.set, number, problem.example)
        head = f"{title}: a prompt of {len(problem.prompt)} tokens, to be completed"
        untrained = np.zeros(len(problem.prompt), bool)
        yield head + "\n" + _shown(setup, problem.prompt, untrained, colours=colours)


def _packed_rows(
    setup: Setup, sequences: Sequence[tuple[int, TrainingSequence]], *, colours: bool
) -> Iterator[str]:
    """As `make_batch` makes them of one step's demonstrations."""
    training = setup.config.training
    given = [sequence for _, sequence in sequences]
    batch = make_batch(
        given,
        setup.objective,
        training,
        num_microbatches=max_microbatches(len(given), setup.longest_sequence, training),
        length_cap=setup.config.rollout.max_new_tokens,
    )
    yield f"what is trained {'is green' if colours else 'stands between « and »'}"
    packed = pack([sequence.num_inputs for sequence in given], training.row_length)
    for number, members in enumerate(packed[: setup.config.inspect.rows]):
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[number], batch.rows)  # noqa: B023
        used, trained = np.count_nonzero(rows.segment_ids), np.count_nonzero(rows.loss_mask)
        yield (
            f"packed row {number + 1}: {len(members)} sequences, {used:,} of "
            f"{training.row_length:,} tokens ({used / training.row_length:.1%} full), "
            f"{trained:,} trained"
        )
        for segment, member in enumerate(members, start=1):
            index, sequence = sequences[member]
            own = rows.segment_ids == segment
            # The last token is a target only, the first one is never a target.
            tokens = np.append(rows.tokens[own], rows.targets[own][-1])
            mask = np.append(False, rows.loss_mask[own])
            head = (
                f"{_title('train', index, setup.data.train[index].example)}: a prompt of "
                f"{len(sequence.prompt)} tokens, a demonstration of "
                f"{len(sequence.trajectory.tokens)}"
            )
            yield head + "\n" + _shown(setup, tokens, mask, colours=colours)


def _title(name: str, index: int, example: Example) -> str:
    """Where a row stands, what is right there and who says so."""
    where = place(example, name, index + 1)
    return f"{where} ({example.kind}, answer {shorten(example.answer, 80)!r})"


def _shown(setup: Setup, tokens: np.ndarray, trained: np.ndarray, *, colours: bool) -> str:
    text = _indented(marked(setup.tokenizer, tokens, trained, colours=colours))
    return text + "\n" + _indented(str(tokens.tolist())) if setup.config.inspect.ids else text


def marked(tokenizer: Tokenizer, tokens: np.ndarray, trained: np.ndarray, *, colours: bool) -> str:
    """Text of the tokens, those that are trained told apart; see the module's own text."""
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
