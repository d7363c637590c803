"""The sources of a configuration by their keys, and what is wrong with them before any is read."""

import math
from typing import NamedTuple

from srft_jax.config import DataConfig, ProceduralConfig, SourceConfig, UsageError
from srft_jax.config.data import WAYS
from srft_jax.data.schemas import check_columns

TRAIN = "train"


class NamedSource(NamedTuple):
    """A source and its place in the configuration.

    Attributes:
        key: Key of the configuration, such as data.mixture[1].
        set_name: Set that its examples belong to: train, or the name of an evaluation set.
        number: Number within the mixture, from 0.
        source: How it is read.
    """

    key: str
    set_name: str
    number: int
    source: SourceConfig


def named_sources(config: DataConfig) -> list[NamedSource]:
    """Return every source that is configured: of training, then of evaluation sets.

    Raises:
        UsageError: Both or neither of `train` and `mixture`, or an evaluation set with a name that
            it cannot have.
    """
    if (config.train is None) == (not config.mixture):
        which = "neither is" if config.train is None else "both are"
        raise UsageError(f"exactly one of data.train and data.mixture must be set; {which}.")
    training = [config.train] if config.train is not None else config.mixture
    keys = (
        ["data.train"]
        if config.train is not None
        else [f"data.mixture[{number}]" for number in range(len(training))]
    )
    sources = [
        NamedSource(key, TRAIN, number, source)
        for number, (key, source) in enumerate(zip(keys, training, strict=True))
    ]
    for name, evaluated in config.evaluation.items():
        if name == TRAIN or "/" in name or not name.strip():  # metrics are eval/<name>/...
            raise UsageError(
                f"data.evaluation: {name!r} cannot name an evaluation set; choose another."
            )
        if evaluated is not None:
            sources.append(NamedSource(f"data.evaluation.{name}", name, 0, evaluated))
    return sources


def check_source(named: NamedSource) -> None:
    """Check what can be known about a source before it is read.

    Raises:
        UsageError: names the key.
    """
    key, source = named.key, named.source
    ways = [way for way in WAYS if vars(source)[way] is not None]
    if len(ways) != 1:
        which = " and ".join(ways) or "none"
        raise UsageError(
            f"{key} must have exactly one of {', '.join(WAYS)}, but has {which}; "
            f"null turns one off, as in --{key}.procedural null."
        )
    if source.hub is not None and not source.hub.name.strip():
        raise UsageError(f"{key}.hub.name is empty.")
    if source.limit is not None and source.limit < 1:
        raise UsageError(f"{key}.limit = {source.limit} is not at least 1.")
    if not 0 < source.weight < math.inf:
        raise UsageError(f"{key}.weight = {source.weight} is not above 0.")
    if source.weight != 1 and not key.startswith("data.mixture"):
        raise UsageError(f"{key}.weight = {source.weight} weighs nothing outside data.mixture.")
    if ways[0] in ("procedural", "gym"):
        _check_generated(named, ways[0])
    else:
        check_columns(key, source)


def _check_generated(named: NamedSource, way: str) -> None:
    """Refuse keys that say how rows of files and of the hub are read."""
    key, source = named.key, named.source
    default = SourceConfig()
    for name in ("columns", "answer_from", "shuffle_options", "kind"):
        if vars(source)[name] != vars(default)[name]:
            raise UsageError(f"{key}.{name} is of files and the hub, but {key} has {way}.")
    if source.procedural is None or named.set_name == TRAIN:
        return
    for name in ("demonstrated", "terse_fraction"):
        value = vars(source.procedural)[name]
        if value != vars(ProceduralConfig())[name]:
            raise UsageError(
                f"{key}.procedural.{name} = {value}, but only training problems are demonstrated."
            )
