"""Read datasets in folders through the package `datasets`, without any request to the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeopd.config.suggest import did_you_mean
from mergeopd.data.rows import table_row
from mergeopd.errors import DataError
from mergeopd.recipe.dataset_folders import card_subsets, download_command, split_patterns
from mergeopd.recipe.plan import SourcePlan

if TYPE_CHECKING:
    import datasets

# Builders of `datasets` whose rows are text and numbers.
_READERS = ("arrow", "csv", "json", "parquet", "text")


@dataclass(frozen=True)
class OpenedDataset:
    """One split of a dataset. `files` are those that it is read from."""

    data: datasets.Dataset | datasets.IterableDataset
    files: tuple[Path, ...]
    columns: tuple[str, ...]

    def rows(self, used: Collection[str]) -> Iterator[dict[str, Any]]:
        """Yield rows with the columns of `used` only."""
        columns = [name for name in self.columns if name in used]
        with _without_torch():
            selected = self.data.select_columns(columns)
        return map(table_row, selected)


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep `datasets` from importing torch, for a base class of its streams that only data loaders need."""
    import datasets

    before, datasets.config.TORCH_AVAILABLE = datasets.config.TORCH_AVAILABLE, False
    try:
        yield
    finally:
        datasets.config.TORCH_AVAILABLE = before


def open_dataset(source: SourcePlan) -> OpenedDataset:
    """Open the split of a dataset folder.

    Raises DataError if the subset, the split or its files do not exist, and for datasets that need a script
    or a request to the network.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    folder = Path(source.source)
    _refuse_script(source, folder)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return _saved(source, datasets.load_from_disk(folder))
        with _without_torch():
            return _files(source, folder)
    except DataError:
        raise
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        remedy = "correct the folder"
        if source.dataset is not None:
            remedy = f"download all of its files (`{download_command(source.dataset, source.revision)}`)"
        raise DataError(f"{source.title}: cannot be read as a dataset: {reason}; {remedy}") from error


def _saved(source: SourcePlan, saved: datasets.Dataset | datasets.DatasetDict) -> OpenedDataset:
    """Open what `save_to_disk` wrote: a dictionary of splits, or one of them."""
    if source.subset is not None:
        raise DataError(f"{source.title}: a dataset of `save_to_disk` has no subsets; remove `subset`")
    if isinstance(saved, dict):
        saved = saved[_chosen(source, "split", source.split, list(saved))]
    elif source.split not in (None, str(saved.split)):
        raise DataError(f"{source.title}: the folder is one split ({saved.split}); remove `split`")
    files = tuple(Path(file["filename"]) for file in saved.cache_files)
    return OpenedDataset(saved, files, tuple(saved.column_names))


def _files(source: SourcePlan, folder: Path) -> OpenedDataset:
    """Open a folder of data files, whose card may list subsets and splits."""
    import datasets

    subsets = card_subsets(folder)
    _refuse_network(source, subsets)
    subset, patterns = source.subset, None
    if subsets:
        default = [name for name, entry in subsets.items() if entry.get("default") is True]
        default = default or [name for name in subsets if name == "default"]
        subset = _chosen(source, "subset", subset, list(subsets), default)
        patterns = split_patterns(subsets[subset])
    elif subset is not None:
        raise DataError(f"{source.title}: its card lists no subsets; remove `subset`")
    chosen = None
    if patterns is not None:
        # Other splits need not be in the cache.
        split = _chosen(source, "split", source.split, list(patterns))
        chosen = {split: patterns[split]}
    with tempfile.TemporaryDirectory() as cache:
        builder = datasets.load_dataset_builder(str(folder), subset, data_files=chosen, cache_dir=cache)
    if builder.name not in _READERS:
        raise DataError(f"{source.title}: has files of kind '{builder.name}', not of text")
    split = _chosen(source, "split", source.split, list(builder.config.data_files))
    files = tuple(Path(os.path.abspath(file)) for file in builder.config.data_files[split])
    outside = [file for file in files if not file.is_relative_to(folder.resolve())]
    if outside:
        raise DataError(
            f"{source.title}: its card names a file outside of it ({outside[0]}); correct the card"
        )
    data = builder.as_streaming_dataset(split)
    columns = data.column_names or list(next(iter(data), {}))
    return OpenedDataset(data, files, tuple(columns))


def _chosen(
    source: SourcePlan, key: str, written: str | None, names: list[str], default: Collection[str] = ()
) -> str:
    """Return the subset or split that is written, the default one, or the only one."""
    if written is None and (default or len(names) == 1):
        return next(iter(default or names))
    listed = f"there {'are' if len(names) > 1 else 'is'} {', '.join(map(repr, sorted(names)))}"
    if written is None:
        raise DataError(f"{source.title}: has several {key}s ({listed}); choose one with `{key}`")
    if written not in names:
        name, _, part = written.partition("[")
        remedy = did_you_mean(written, names, f"choose another `{key}`")
        if part and name in names:
            remedy = f"write `split: {name}`, and `limit: N` for its first N rows"
        raise DataError(f"{source.title}: has no {key} '{written}' ({listed}); {remedy}")
    return written


def _refuse_script(source: SourcePlan, folder: Path) -> None:
    name = (source.dataset or folder.name).rpartition("/")[2]
    if (folder / f"{name}.py").is_file():
        remedy = "write its rows to a .jsonl or .parquet file, and name that"
        if source.dataset:
            remedy = "read the files that the hub made of it (`revision: refs/convert/parquet`)"
        raise DataError(
            f"{source.title}: needs the script {name}.py, and no code of datasets is run; {remedy}"
        )


def _refuse_network(source: SourcePlan, subsets: Mapping[str, Any]) -> None:
    """Refuse cards that name files by URL."""
    waiting: list[Any] = list(subsets.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and "://" in value:
            raise DataError(
                f"{source.title}: its card names a file on the network ({value}); download and name that"
            )
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
