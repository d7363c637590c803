"""Rows of a dataset on the Hugging Face hub, or of a local folder in the hub's layout.

The library `datasets` downloads and caches. Nothing else needs it, so it is an extra.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from srft_jax.config import HubConfig, UsageError
from srft_jax.data.arrow import BATCH, table_rows
from srft_jax.data.source_rows import Row


def read_hub(config: HubConfig, key: str, *, batch: int = BATCH) -> Iterator[Row]:
    """Yield every row of the split.

    Args:
        config: Dataset, subset and split.
        key: Key of the configuration, for messages.
        batch: Rows turned into Python's objects at a time.

    Raises:
        UsageError: `datasets` is not installed, or the dataset, its subset or its split cannot be
            loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{key} needs the library `datasets`: pip install 'srft_jax[hub]'."
        ) from error
    if config.revision is not None and Path(config.name).is_dir():
        raise UsageError(
            f"{key}.revision = {config.revision}, but {config.name} is a local folder, which has "
            "no revisions."
        )
    datasets.disable_progress_bars()
    # Without a network the library logs each attempt that failed, twice.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        dataset = datasets.load_dataset(
            config.name, config.subset, split=config.split, revision=config.revision
        )
    # A subset or split that does not exist is a ValueError. Anything else (no network, no such
    # dataset, unreadable files) is an error of one of several libraries, the one for HTTP included.
    except Exception as error:
        raise UsageError(_sentence(config, key, error)) from error
    name, first = f"{config.name}[{config.split}]", 1
    for table in dataset.with_format("arrow").iter(batch):
        yield from table_rows(table, name, first)
        first += len(table)


def _sentence(config: HubConfig, key: str, error: Exception) -> str:
    # The error says only that something went wrong; its cause says what.
    said = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    reason = ": ".join(" ".join(text.split()).rstrip(".") for text in said)
    advice = (
        "check its subset and split"
        if isinstance(error, ValueError)
        else "check the name; accept a gated dataset's terms on the hub and set HF_TOKEN; without "
        "a network, download it where there is one and name the local folder"
    )
    return f"{key}: {config.name} cannot be loaded: {reason}; {advice}."
