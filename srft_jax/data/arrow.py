"""Rows of Parquet files and of datasets on the hub: both come as Arrow tables.

Arrow's values become JSON's by one rule: dates and times are ISO 8601 text, durations seconds,
decimals text, bytes base64 text, maps lists of pairs, and a float that JSON lacks is null.
"""

import base64
import datetime
import decimal
import math
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from etils import epath

from srft_jax.config import UsageError
from srft_jax.data.source_rows import Row

BATCH = 128  # rows turned into Python's objects at a time


def read_parquet(path: epath.Path) -> Iterator[Row]:
    """Yield every row of a file.

    Raises:
        UsageError: the file is not Parquet, or broken.
    """
    with path.open("rb") as file:
        try:
            first = 1
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH):
                yield from table_rows(batch, str(path), first)
                first += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{path} cannot be read as Parquet: {reason}") from error


def table_rows(table: pyarrow.RecordBatch | pyarrow.Table, name: str, first: int) -> Iterator[Row]:
    """Yield the rows of a table, numbered from `first`; a row that Python cannot hold says so."""
    try:
        values = table.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        # Not UTF-8, or a date before the year 1: reading row by row shows where.
        for offset in range(len(table)):
            yield _single_row(table.slice(offset, 1), f"{name}, row {first + offset}")
        return
    for offset, value in enumerate(values):
        yield Row(f"{name}, row {first + offset}", to_json(value))


def _single_row(table: pyarrow.RecordBatch | pyarrow.Table, where: str) -> Row:
    for column in table.column_names:
        try:
            table.select([column]).to_pylist()
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            return Row(where, problem=f"{column!r} cannot be read: {error}.")
    return Row(where, to_json(table.to_pylist()[0]))


def to_json(value: Any) -> Any:
    """Turn a value of Arrow into one of JSON, by the rule at the top of the module."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): to_json(inner) for key, inner in value.items()}
        case list() | tuple():
            return [to_json(inner) for inner in value]
        case datetime.date() | datetime.time():  # a datetime is a date
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case decimal.Decimal():
            return str(value)
        case _:
            return str(value)
