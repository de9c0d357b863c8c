"""Hub models as local folders. A model that is already downloaded is used as it is, without asking the network.

A run therefore gives the same result tomorrow and offline: a newer commit of the branch is not used until the local
copy is deleted or ``revision`` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from align.errors import EnvironmentFault, InputError, Problem
from align.models.files.folder import read_folder, require_tokenizer

PATIENCE = 5.0
"""Seconds to wait for the hub's first response before it is called unreachable."""

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
"""The files that are downloaded. Never ``.py`` and never pickles."""
_UNWANTED = ["*/*", "consolidated*"]
"""Copies of the same weights in other formats, which are not downloaded."""


def cached_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub id stands for on this machine: the pinned one, or the one its branch had when it was
    downloaded. Does not use the network."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name

    revision = revision or constants.DEFAULT_REVISION
    if REGEX_COMMIT_HASH.fullmatch(revision):
        return revision
    reference = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs", revision)
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _complete(snapshot: Path) -> bool:
    """Are all files here? Other programs leave snapshots with only what they needed, such as the tokenizer."""
    try:
        read_folder(snapshot, None)
        require_tokenizer(snapshot)
    except InputError:
        return False
    return True


def local_snapshot(
    name: str,
    revision: str | None,
    *,
    unwanted: Sequence[str] = _UNWANTED,
    complete: Callable[[Path], bool] = _complete,
) -> Path:
    """The folder of a hub model's configuration, tokenizer and safetensors, downloaded first if they are not here yet.

    Args:
        unwanted: patterns of files that are not downloaded; by default all files in subfolders.
        complete: tells whether a folder that is already here has all needed files.

    Raises:
        InputError: the hub has no such model or revision, or the name cannot be one.
        EnvironmentFault: not downloaded, and the hub cannot be reached (within seconds), is switched off, or refuses
            access.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        commit = cached_commit(name, revision)
        if commit is not None:
            skip = list(unwanted)
            local = Path(
                snapshot_download(
                    name, revision=commit, local_files_only=True, allow_patterns=_WANTED, ignore_patterns=skip
                )
            )
            if complete(local):
                return local
    except LocalEntryNotFoundError:
        pass  # the branch is known, but not (all of) its files
    except HFValidationError as error:
        raise InputError(f"{name[:80]!r} is neither a path that exists nor a hub id") from error
    return _download(name, commit or revision, list(unwanted))


def ask(name: str, revision: str | None, *, data: bool = False) -> None:
    """Ask the hub whether it has this model, or with ``data`` this data set. Downloads nothing. Raises as
    :func:`local_snapshot`."""
    from huggingface_hub import HfApi

    with _answers(name, revision, "data set" if data else "model"):
        (HfApi().dataset_info if data else HfApi().model_info)(name, revision=revision, timeout=PATIENCE)


def _download(name: str, revision: str | None, unwanted: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    with _answers(name, revision, "model"):
        # Ask first whether the model exists: snapshot_download waits for an answer without a time limit.
        commit = HfApi().model_info(name, revision=revision, timeout=PATIENCE).sha
        return Path(snapshot_download(name, revision=commit, allow_patterns=_WANTED, ignore_patterns=unwanted))


@contextmanager
def _answers(name: str, revision: str | None, kind: str) -> Iterator[None]:
    """Turns what the hub client raises about ``name`` into this package's errors."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{name[:80]!r} is neither a path that exists nor a hub id") from error
    except GatedRepoError as error:
        raise EnvironmentFault(
            f"{name}: the hub asks for access", hint="accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name}: the hub has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such path, and no such {kind} on the hub (or HF_TOKEN is not set for it)"
        ) from error
    except OfflineModeIsEnabled as error:
        problem = "not on this machine, and the network is switched off"
        raise EnvironmentFault(
            Problem(f"{name}: {problem}", hint="unset HF_HUB_OFFLINE once to download it, or name a folder")
        ) from error
    # The client's transport errors have no public base class; all of them mean the same here
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        problem = f"{name}: not on this machine, and the hub cannot be reached ({reason[0][:120]})"
        raise EnvironmentFault(Problem(problem, hint="connect to the network, or name a folder")) from error
