"""What a config names as data: files, saved folders, data sets of a hub; and which reader reads them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from roll_opd.datasets.row import Lines
from roll_opd.datasets.tables import is_saved_dataset, read_arrow, read_hub, read_parquet
from roll_opd.datasets.text_files import read_csv, read_json_lines
from roll_opd.errors import DataError

logger = logging.getLogger(__name__)

DatasetType = Literal["json", "jsonl", "parquet", "csv", "arrow", "hub"]

# One entry a format of files.
_READERS: dict[str, Callable[[Path], Lines]] = {
    "json": read_json_lines,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "csv": read_csv,
    "arrow": read_arrow,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Something that rows come from."""

    name: str
    """What error messages and rows call it: the path of a file as it was found, or ``name[split]``."""
    stem: str
    """Begins the ids of rows that have none."""
    read: Callable[[], Lines]
    """Opens it and yields its rows."""


def find_source(
    name: str | Path,
    dataset_dir: str | Path | None = None,
    *,
    dataset_type: DatasetType = "json",
    split: str | None = None,
    subset: str | None = None,
) -> Source:
    """Finds what ``name`` means and its reader; opens nothing.

    Args:
        name: of a file (:func:`find_file`), a folder that ``datasets`` saved, or a data set of a hub.
        dataset_dir: a folder in which relative names are looked for too.
        dataset_type: the format. ``json``, the default, leaves it to the file's ending. ``hub`` is everything that the
            library ``datasets`` loads.
        split: of a hub's or saved data set; None is ``train``.
        subset: configuration of a hub's data set.

    Raises:
        DataError: no such file, an ending that names no format, or a split or subset of a plain file.
    """
    candidates = _candidates(name, dataset_dir)
    folder = next((path for path in candidates if path.is_dir()), None)
    if dataset_type == "hub" and (file := next((path for path in candidates if path.is_file()), None)):
        raise DataError(f"{file}: this is a file, not a data set of a hub; remove data_args.dataset_type")
    if dataset_type == "hub" or (dataset_type == "json" and folder is not None and is_saved_dataset(folder)):
        found = str(name) if folder is None else str(folder)
        label = found if split is None and folder is not None else f"{found}[{split or 'train'}]"
        return Source(label, Path(found).name, functools.partial(read_hub, found, split, subset))
    path = find_file(name, dataset_dir)
    for setting, value in (("split", split), ("subset", subset)):
        if value is not None:
            raise DataError(f"{path}: a data file has no {setting}; remove data_args.{setting}")
    kind: str = dataset_type
    if dataset_type == "json":
        kind = path.suffix.lower().removeprefix(".")
        if kind not in _READERS:
            raise DataError(
                f"{path}: cannot tell the format of files that end in {path.suffix!r}; supported: "
                f"{', '.join('.' + kind for kind in _READERS)}; or set data_args.dataset_type"
            )
    return Source(str(path), path.stem, functools.partial(_READERS[kind], path))


def _candidates(name: str | Path, dataset_dir: str | Path | None) -> list[Path]:
    """Where a name may be, in the order in which it is tried."""
    path = Path(name).expanduser()
    candidates = [path]
    if dataset_dir is not None and not path.is_absolute():
        folder = Path(dataset_dir).expanduser()
        candidates += [folder / path, folder / path.name]
    return list(dict.fromkeys(candidates))


def find_file(name: str | Path, dataset_dir: str | Path | None = None) -> Path:
    """Finds a data file by the name that a config gives it.

    Tried in this order: the name itself (absolute, or relative to the working directory); inside ``dataset_dir``;
    by its last part inside ``dataset_dir``. The last serves configs in ROLL's style, where ``dataset_dir: data``
    stands beside ``file_name: data/x.jsonl``.

    Raises:
        DataError: no such file, with all that was tried; or a folder where a file is needed.
    """
    path = Path(name).expanduser()
    folder = None if dataset_dir is None else Path(dataset_dir).expanduser()
    candidates = _candidates(name, dataset_dir)
    for candidate in candidates:
        if candidate.is_file():
            if folder is not None and candidate == folder / path.name and path.parent.name not in ("", folder.name):
                # Same last name, other folder: most likely what is meant, but a person should see it.
                logger.warning("data file %s: read from %s, which has the same name", name, candidate)
            return candidate
    for candidate in candidates:
        if candidate.is_dir():
            raise DataError(
                f"{candidate}: this is a folder; name the data files in it, or set data_args.dataset_type: hub"
            )
    tried = ", ".join(str(candidate.absolute()) for candidate in candidates)
    raise DataError(f"{name}: data file not found; tried {tried}")
