"""Finding the files of a data source: a single file, a folder of files, a folder with splits, a folder that
``datasets`` saved, or a stage's result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.files.streams import COMPRESSED, kind_of
from align.data.rows import Told
from align.errors import InputError, Problem
from align.recipe.checks.source_keys import idle, is_artefact, is_saved
from align.recipe.schema import DataSource

TEXT_TABLES = (".csv", ".tsv", ".txt")
JSON_LINES = (".jsonl", ".ndjson")
ARROW = (".arrow", ".feather")
READABLE = (*JSON_LINES, ".json", *TEXT_TABLES, ".parquet", *ARROW)
"""Suffixes of files that can be read; text files may also be compressed."""


def data_files(location: Path, source: DataSource, told: Told | None = None) -> list[Path]:
    """The files of ``location`` in reading order: itself, or those in the folder.

    Raises :class:`InputError` when it does not exist, holds nothing that can be read, or ``source`` has keys without
    effect for it.
    """
    told = told or Told()
    files = list(_in_folder(location, source, told)) if location.is_dir() else [_checked_file(location)]
    useless = idle(source, location, files)
    if useless:
        raise InputError([Problem(what, file=str(location), key=key) for key, what in useless.items()])
    return files


def is_readable(path: Path) -> bool:
    """Does the file have the suffix of a readable data file?"""
    kind = kind_of(path)
    plain = path.suffix.lower() not in COMPRESSED
    return kind in READABLE and (plain or kind not in (".parquet", *ARROW)) and not path.name.startswith(".")


def _checked_file(path: Path) -> Path:
    if not path.exists():
        raise InputError(Problem("no such file or folder", file=str(path)))
    if not path.is_file():
        raise InputError(Problem("not a regular file", file=str(path)))
    if path.suffix.lower() == ".py":
        hint = "data sets that are programs are not run; for a format of your own set `format: package.module:function`"
        raise InputError(Problem("a Python file is not data", file=str(path), hint=hint))
    if not is_readable(path):
        what = f"unknown suffix {path.suffix}" if path.suffix else "no suffix"
        raise InputError(Problem(f"{what}; readable are {_readable()}", file=str(path)))
    return path


def _readable() -> str:
    return f"{', '.join(READABLE)}, texts also with {', '.join(COMPRESSED)}"


def _in_folder(folder: Path, source: DataSource, told: Told) -> list[Path]:
    if is_artefact(folder):
        return [folder / "data.jsonl"]
    if is_saved(folder):
        return _saved(folder, source, told)
    direct = sorted(path for path in folder.iterdir() if path.is_file() and is_readable(path))
    found = _by_split(folder, source) if source.split or source.subset or _may_have_splits(folder, direct) else None
    if source.subset and (found is None or not found.declared):
        raise InputError(Problem("has no effect: no README here declares subsets", file=str(folder), key="subset"))
    if found is None:
        if source.split:
            raise InputError(
                Problem("has no effect: the files here are not named by split", file=str(folder), key="split")
            )
        if not direct:
            raise InputError(
                Problem("no data file in this folder", file=str(folder), hint=f"readable are {_readable()}")
            )
        return direct
    if len(found.splits) == 1 and not source.split and not source.subset and not found.declared and direct:
        return direct  # there is only one split, so nothing has to be chosen
    split = _chosen(source.split, found.splits, folder)
    others = [name for name in found.splits if name != split]
    files = found.splits[split]
    told.note(
        f"{folder}: split {split}, {len(files)} file{'s' * (len(files) != 1)}"
        + (f"; not read: {', '.join(others)}" if others else ""),
        **({} if source.split else {"split": split}),
    )
    return files


def _chosen(asked: str | None, splits: dict[str, Any], folder: Path) -> str:
    split = asked or "train"
    if split not in splits:
        what = f"no split {split[:80]}" if asked else "has no split train"
        hint = f"set `split` to one of {', '.join(splits)}"
        if asked and "[" in asked:
            hint += "; a part of one is taken with `limit`"
        raise InputError(Problem(what, file=str(folder), key="split", hint=hint))
    return split


# What `datasets` saved


def _saved(folder: Path, source: DataSource, told: Told) -> list[Path]:
    """The Arrow files of ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``, in their order."""
    if (folder / "dataset_dict.json").is_file():
        splits = {name: folder / name for name in _json(folder / "dataset_dict.json", "splits")}
        split = _chosen(source.split, splits, folder)
        if not source.split and len(splits) > 1:
            others = ", ".join(name for name in splits if name != split)
            told.note(f"{folder}: split {split}; not read: {others}", split=split)
        folder = splits[split]
    names = [entry["filename"] for entry in _json(folder / "state.json", "_data_files")]
    files = [folder / name for name in names if Path(name).name == name]
    if len(files) != len(names) or not all(path.is_file() for path in files):
        raise InputError(
            Problem("names files that are not beside it", file=str(folder / "state.json"), hint="is the copy whole?")
        )
    return files


def _json(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(Problem(f"not what `datasets` saves: it has no {key}", file=str(path))) from error


# Folders by split, as the hub has them


@dataclass(frozen=True)
class _Splits:
    splits: dict[str, list[Path]]
    declared: bool
    """Are the splits declared in the folder's README, or recognised by file names?"""


def _may_have_splits(folder: Path, direct: list[Path]) -> bool:
    """A quick check without a library: could the folder have several splits?"""
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return len(direct) > 1 or (folder / "README.md").is_file() or any(True for _ in inside)


def _by_split(folder: Path, source: DataSource) -> _Splits | None:
    """The splits of a downloaded hub repository, found by the rules of ``datasets``; None if all files belong
    together."""
    from datasets.data_files import (
        DEFAULT_PATTERNS_ALL,
        DataFilesDict,
        EmptyDatasetError,
        get_data_patterns,
        sanitize_patterns,
    )

    base = folder.resolve().as_posix()
    declared = _declared(folder, source)
    try:
        patterns = sanitize_patterns(declared) if declared is not None else get_data_patterns(base)
        if (
            declared is None
            and patterns == DEFAULT_PATTERNS_ALL
            and any(is_readable(path) for path in folder.iterdir())
        ):
            return None
        found = DataFilesDict.from_patterns(patterns, base_path=base)
    except (EmptyDatasetError, FileNotFoundError):
        return None
    splits = {
        str(name): sorted(path for path in map(Path, files) if is_readable(path)) for name, files in found.items()
    }
    splits = {name: [folder / path.relative_to(base) for path in files] for name, files in splits.items() if files}
    return _Splits(splits, declared is not None) if splits else None


def _declared(folder: Path, source: DataSource) -> Any:
    """The files of the subset as the folder's README declares them (``configs``); None when it declares none."""
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme = folder / "README.md"
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data) if readme.is_file() else {}
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise InputError(
            Problem("its header is not what the hub understands", file=str(readme), hint=str(error)[:80])
        ) from error
    configs = {name: config["data_files"] for name, config in configs.items() if config.get("data_files")}
    if not configs:
        return None
    if source.subset is None and len(configs) > 1 and "default" not in configs:
        hint = f"set `subset` to one of {', '.join(configs)}"
        raise InputError(Problem("has several subsets", file=str(folder), key="subset", hint=hint))
    name = source.subset or ("default" if "default" in configs else next(iter(configs)))
    if name not in configs:
        hint = f"set `subset` to one of {', '.join(configs)}"
        raise InputError(Problem(f"no subset {name[:80]}", file=str(folder), key="subset", hint=hint))
    return _by_name(configs[name])


def _by_name(data_files: Any) -> Any:
    """``[{split: train, path: ...}]`` as a mapping; ``datasets`` reads other forms itself."""
    if isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files):
        return {entry["split"]: entry["path"] for entry in data_files}
    return data_files


def names_of(files: list[Path], location: Path) -> Iterator[str]:
    """Names of the files relative to ``location``, which do not change when it is moved."""
    for path in files:
        yield path.relative_to(location).as_posix() if path.is_relative_to(location) and path != location else path.name
