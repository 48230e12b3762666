"""Find the folders of datasets, on disk or in the local cache of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from mergeopd.config.folders import Missing, cached_snapshot, is_hub_failure

_DATA = ("*.parquet", "*.arrow", "*.csv*", "*.json*", "*.txt*")
_CARDS = ("README.md", ".huggingface.yaml")


def download_command(dataset: str, revision: str | None) -> str:
    """Return the command that fills the cache."""
    return f"hf download {dataset} --repo-type dataset" + (f" --revision {revision}" if revision else "")


def hub_dataset(
    dataset: str, subset: str | None, split: str | None, revision: str | None, *, download: bool
) -> Path | Missing:
    """Return the folder of a dataset in the hub's cache; with `download`, what it lacks is fetched first."""
    folder = cached_snapshot(dataset, revision, repo_type="dataset")
    if download and (folder is None or not _is_whole(folder, subset, split)):
        return _download(dataset, subset, split, folder.name if folder else revision)
    if folder is not None:
        return folder
    where = f"at revision '{revision}' in" if revision else "in"
    return Missing(
        f"'{dataset}' is neither a file or folder nor {where} the local cache of the Hugging Face hub",
        f"correct the path, or, if this is a dataset of the hub, set `download: true`, or download it: "
        f"`{download_command(dataset, revision)}`",
    )


def card_subsets(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the subsets (`configs`) that a dataset's card lists, by name; none if it lists none."""
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    if not card.is_file():
        return {}
    configs = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict().get("configs")
    listed = configs if isinstance(configs, list) else []
    return {
        c["config_name"]: c for c in listed if isinstance(c, dict) and isinstance(c.get("config_name"), str)
    }


def split_patterns(subset: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """Return the patterns of a subset's files by split; None if its card leaves them to their names."""
    files = subset.get("data_files")
    files = [files] if isinstance(files, str) else files
    if "data_dir" in subset or not isinstance(files, list):
        return None
    if all(isinstance(file, str) for file in files):
        return {"train": files}
    if not all(isinstance(file, dict) and {"split", "path"} <= file.keys() for file in files):
        return None
    return {str(f["split"]): [f["path"]] if isinstance(f["path"], str) else list(f["path"]) for f in files}


def _wanted(folder: Path, subset: str | None, split: str | None) -> list[str]:
    """Return the patterns of the files of a subset and split, of all where the card does not tell them."""
    subsets = card_subsets(folder)
    chosen = [subsets[subset]] if subset in subsets else list(subsets.values())
    patterns: list[str] = []
    for listed in map(split_patterns, chosen):
        if listed is None:
            return list(_DATA)
        patterns += listed[split] if split in listed else [p for paths in listed.values() for p in paths]
    return patterns or list(_DATA)


def _is_whole(folder: Path, subset: str | None, split: str | None) -> bool:
    """Whether the cache has files of a subset and split."""
    wanted = _wanted(folder, subset, split)
    if wanted == list(_DATA):
        return any(glob(f"**/{pattern}", root_dir=folder, recursive=True) for pattern in wanted)
    return all(glob(pattern, root_dir=folder, recursive=True) for pattern in wanted)


def _download(dataset: str, subset: str | None, split: str | None, revision: str | None) -> Path | Missing:
    """Fetch the card, and then the files of a subset and split."""
    from huggingface_hub import snapshot_download

    def fetch(commit: str | None, patterns: Sequence[str]) -> Path:
        return Path(
            snapshot_download(dataset, repo_type="dataset", revision=commit, allow_patterns=list(patterns))
        )

    try:
        folder = fetch(revision, _CARDS)
        # The commit of the card, in case another one is pushed meanwhile.
        return fetch(folder.name, (*_CARDS, *_wanted(folder, subset, split)))
    except Exception as error:
        if not is_hub_failure(error) and not isinstance(error, ValueError):  # of invalid names
            raise
        reason = (str(error) or type(error).__name__).partition("\n")[0].removesuffix(".")
    remedy = "check its name, revision, the connection and `hf auth whoami`, or download it elsewhere"
    return Missing(f"'{dataset}' cannot be downloaded: {reason}", remedy)
