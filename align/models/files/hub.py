"""Hub models as local folders. Local first: what is already downloaded is used as it is, without a look at the network.

A run then means the same tomorrow and offline: a branch that moved on is not followed until the local copy is deleted
or ``revision`` names another commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from align.errors import EnvironmentFault, InputError, Problem
from align.models.files.folder import read_folder, require_tokenizer

PATIENCE = 5.0
"""Seconds to wait for the hub's first answer before the model is called unreachable."""

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
"""Never ``.py`` and never pickles."""
_UNWANTED = ["*/*", "consolidated*"]
"""Other formats' copies of the same weights."""


def cached_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub id means on this machine: the pinned one, or the one its branch had when it was downloaded.
    No network."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name

    revision = revision or constants.DEFAULT_REVISION
    if REGEX_COMMIT_HASH.fullmatch(revision):
        return revision
    reference = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs", revision)
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def _complete(snapshot: Path) -> bool:
    """Other programs leave snapshots that hold only what they needed, such as the tokenizer."""
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
        unwanted: files that are not fetched, as patterns; by default all that lie in subfolders.
        complete: does a folder that is here already hold all that is needed?

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
    """One short question: has the hub this model, or this data set? Nothing is downloaded. Raises as
    :func:`local_snapshot`."""
    from huggingface_hub import HfApi

    with _answers(name, revision, "data set" if data else "model"):
        (HfApi().dataset_info if data else HfApi().model_info)(name, revision=revision, timeout=PATIENCE)


def _download(name: str, revision: str | None, unwanted: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    with _answers(name, revision, "model"):
        # One short question first: snapshot_download has no limit on the time it waits for an answer.
        commit = HfApi().model_info(name, revision=revision, timeout=PATIENCE).sha
        return Path(snapshot_download(name, revision=commit, allow_patterns=_WANTED, ignore_patterns=unwanted))


@contextmanager
def _answers(name: str, revision: str | None, kind: str) -> Iterator[None]:
    """What the hub, or the way to it, may answer to a question about ``name``, as errors of ours."""
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
