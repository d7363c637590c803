"""Verb `inspect`: the data as the model sees it, before any model is loaded."""

import sys
from collections.abc import Iterator

import jax

from srft_jax.config import RunConfig, UsageError
from srft_jax.models import lora
from srft_jax.models.decoder import init_params
from srft_jax.report import data_view
from srft_jax.report.terminal import shows_colours
from srft_jax.setup.prepare import Setup, prepare
from srft_jax.tasks.planned import step_arithmetic, with_rows


def inspect(config: RunConfig) -> int:
    """Print batch arithmetic, sets, lengths, the prompt's form and the first rows of a set."""
    setup, _ = with_rows(prepare(config))
    config, data, architecture = setup.config, setup.data, setup.model_config
    names = ["train", *data.evaluation]
    if config.inspect.set not in names:
        raise UsageError(f"inspect.set = {config.inspect.set} is none of {', '.join(names)}")
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    parts = [
        step_arithmetic(
            setup, lora.frozen(shapes, architecture), lora.trained(shapes, architecture)
        ),
        data_view.sets_table(data),
        data_view.lengths_table(
            data,
            most_prompt=config.data.max_prompt_tokens,
            most_demonstration=config.longest_demonstration,
        ),
        *data_view.packing_lines(data.train, config.training.row_length),
        data_view.prompt_form(setup.tokenizer, config.data.system_prompt),
        *_rows(setup, colours=shows_colours(sys.stdout)),
    ]
    print("\n\n".join(parts))
    return 0


def _rows(setup: Setup, *, colours: bool) -> Iterator[str]:
    """Packed rows of demonstrations where they are trained on, prompts alone otherwise."""
    config, data = setup.config, setup.data
    section, has_any = config.inspect, any(problem.demonstrations for problem in data.train)
    if section.set == "train" and has_any and setup.objective.uses_demonstrations:
        return data_view.packed_rows_shown(
            data.train,
            setup.tokenizer,
            setup.objective,
            config.training,
            prompts_per_step=config.data.prompts_per_step,
            longest_sequence=config.longest_sequence,
            most_rows=section.rows,
            with_ids=section.ids,
            colours=colours,
        )
    return data_view.prompts_shown(
        section.set,
        data.named(section.set)[: section.rows],
        setup.tokenizer,
        with_ids=section.ids,
        colours=colours,
    )
