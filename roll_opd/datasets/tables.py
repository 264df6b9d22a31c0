"""Reads data that lies in columns: Parquet, Arrow, and whatever the library ``datasets`` loads.

``pyarrow`` and ``datasets`` are imported when such data is read: JSON lines need neither.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roll_opd.datasets.row import BadRowError, Lines
from roll_opd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1024
"""Rows turned into Python objects at once."""

_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "cache")
"""What may build a data set for us. Other builders decode media or archives, or (``pandas``) unpickle."""


# --- files -----------------------------------------------------------------------------------------------------------


def read_parquet(path: Path) -> Lines:
    """Yields the rows of a Parquet file."""
    import pyarrow.parquet

    with _readable(path, "Parquet"), pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        yield from _rows(str(path), file.schema_arrow.names, file.iter_batches(batch_size=_BATCH))


def read_arrow(path: Path) -> Lines:
    """Yields the rows of an Arrow file, in the file or in the stream format (``datasets`` writes the latter)."""
    import pyarrow as pa

    with _readable(path, "Arrow"), pa.memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            file = pa.ipc.open_file(source)
            batches: Iterable[pa.RecordBatch] = (file.get_batch(i) for i in range(file.num_record_batches))
            names = file.schema.names
        else:
            batches = stream = pa.ipc.open_stream(source)
            names = stream.schema.names
        yield from _rows(str(path), names, batches)


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Names the file in what pyarrow raises."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise DataError(f"{path}: cannot read the data file as {kind}: {problem}") from error


# --- the library `datasets` -------------------------------------------------------------------------------------------


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets`` wrote the folder with ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_hub(name: str, split: str | None = None, subset: str | None = None) -> Lines:
    """Yields the rows of a data set that ``datasets`` loads. No code and no pickle of the data set is run.

    Args:
        name: of a data set on the Hugging Face hub (or in its cache), or a folder: one that ``save_to_disk`` wrote, or
            one with data files.
        split: ``train``, ``test``, or a slice such as ``train[:1000]`` (slices not for saved folders). By default
            ``train``, and for a saved folder without splits all of it.
        subset: name of one of the data set's configurations.
    """
    import datasets
    import pyarrow as pa

    try:
        if is_saved_dataset(Path(name)):
            data = _load_saved(name, split, subset)
        else:
            builder = datasets.load_dataset_builder(name, subset)
            # datasets.packaged_modules.<kind>.<kind>
            kind = type(builder).__module__.split(".")[-1]
            if kind not in _BUILDERS:
                raise DataError(
                    f"{name}: this data set is read by the builder {kind!r} of `datasets`; only text, JSON, CSV, "
                    "Parquet and Arrow data are; convert it"
                )
            builder.download_and_prepare()
            data = builder.as_dataset(split=split or "train")
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError, pa.ArrowException) as error:
        problem = " ".join(str(error).split())
        hint = ""
        if isinstance(error, ConnectionError):
            hint = (
                "; without a network, load it once where there is one and save it with save_to_disk, then name that "
                "folder here"
            )
        raise DataError(f"{name}: `datasets` cannot load this data set: {problem}{hint}") from error
    # Arrow tables, so that values take the same way as those of Parquet files, whatever format the set was saved with.
    batches = data.with_format("arrow").iter(batch_size=_BATCH)
    yield from _rows(name, data.column_names, batches)


def _load_saved(name: str, split: str | None, subset: str | None) -> Any:
    import datasets

    if subset is not None:
        raise DataError(f"{name}: a saved data set has no subsets; remove data_args.subset")
    data = datasets.load_from_disk(name)
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise DataError(f"{name}: no split {split or 'train'!r}; set data_args.split to one of {', '.join(data)}")
        return data[split or "train"]
    if split is not None and split != str(data.split):
        raise DataError(f"{name}: the saved data set is one split ({data.split}); remove data_args.split")
    return data


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(name: str, columns: list[str], batches: Iterable[pa.RecordBatch | pa.Table]) -> Lines:
    """Numbers the rows of all batches from 1 and turns each into plain Python objects."""
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise DataError(f"{name}: there are two columns {twice[0]!r}")
    line = 0
    for batch in batches:
        for values in _rows_of_batch(batch):
            line += 1
            yield line, values


def _rows_of_batch(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | BadRowError]:
    """The rows of a batch; one that cannot become Python objects is a problem of its own, not of the batch."""
    try:
        rows = batch.to_pylist(maps_as_pydicts="lossy")
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond Python's
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from _rows_of_batch(batch.slice(number, 1))
            return
        yield _unreadable(batch)
        return
    for values in rows:
        yield {column: plain(value) for column, value in values.items()}


def _unreadable(row: pa.RecordBatch | pa.Table) -> BadRowError:
    """What is wrong with a row that ``to_pylist`` refuses, by column."""
    for column in row.column_names:
        try:
            row.select([column]).to_pylist(maps_as_pydicts="lossy")
        except UnicodeDecodeError:
            return BadRowError(f"{column!r} is not UTF-8 text")
        except (ValueError, OverflowError) as error:
            return BadRowError(f"{column!r} cannot be read: {error}")
    raise AssertionError("a row is unreadable and none of its columns is")


def plain(value: Any) -> Any:
    """A value of a table as JSON would give it.

    Decimals become numbers (text where a float would lose digits), dates ISO text, and fields of a struct that are null
    are left out: a table cannot tell "null" from "not given". Binary data stays as it is.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, decimal.Decimal):
        return _number(value)
    if isinstance(value, (datetime.date, datetime.time)):  # datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    return value


def _number(value: decimal.Decimal) -> int | float | str:
    if value == value.to_integral_value():
        return int(value)
    number = float(value)
    return number if decimal.Decimal(repr(number)) == value else format(value, "f")
