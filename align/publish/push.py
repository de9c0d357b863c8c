"""``align push``: uploading a trained model to the Hugging Face Hub, with a card that says how it was made.

Only weights, configuration and tokenizer are uploaded. Other files of a stage (samples, rejected rows, logs) may
contain the user's data. Paths of this machine are removed from the configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from align import files
from align.errors import EnvironmentFault, InputError, Problem
from align.models.files.folder import ADAPTER_CONFIG, MERGED, NOTES
from align.models.files.hub import PATIENCE
from align.pipeline.artifacts import MANIFEST, read_manifest, verify
from align.publish.card import Subject, card
from align.runs.record import RunRecord, find_run, is_run, read_run

MODELS = ("policy", "reward_model")
"""Artefact types that can be pushed."""

_MERGED = f"{MERGED}/"
_MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", ADAPTER_CONFIG, NOTES),
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
        "*.jinja",
    ),
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PATH_KEYS = ("path", "name_or_path", "_name_or_path", "base_model_name_or_path")


@dataclass(frozen=True)
class Upload:
    """What would be pushed."""

    subject: Subject
    card: str
    files: Mapping[str, Path | bytes]
    """Files by their names in the repository, without the card."""

    def listing(self) -> Iterator[str]:
        """One line for each file, the card first."""
        sizes = {"README.md": len(self.card.encode())}
        sizes |= {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }
        yield from (f"{size:>15,}  {name}" for name, size in sizes.items())


def prepare(source: str, runs_dir: Path, *, to: str, stage: str | None = None) -> Upload:
    """Find the model, check every file of it, and write its card. Nothing is sent.

    Args:
        source: a run's name or folder, or the folder of a stage's result.
        to: ``org/name``.
        stage: of the run; the last one that left a model when absent.

    Raises:
        InputError: no model, or a damaged one, or an adapter whose base is nowhere but here.
    """
    _require_name(to)
    folder, run = locate(source, runs_dir, stage)
    problems = verify(folder, deep=True)
    if problems:
        raise InputError(problems)
    manifest = read_manifest(folder)
    if manifest.type not in MODELS:
        raise InputError(
            f"stage {manifest.stage} left {manifest.type.replace('_', ' ')}, which is no model", hint=_models_of(run)
        )
    merged = any(name.startswith(_MERGED) for name in manifest.files)
    chosen = {
        name.removeprefix(_MERGED) if merged else name: folder / name
        for name in manifest.files
        if name.startswith(_MERGED) == merged
    }
    chosen = {name: path for name, path in chosen.items() if _is_of_model(name)}
    notes = _json(chosen.get(NOTES))
    origin = notes.get("base") or {}
    adapter = ADAPTER_CONFIG in chosen
    if adapter and Path(str(origin.get("path", "/"))).is_absolute():
        hint = f"`align merge {folder} --out DIR` makes a whole model of it; then push DIR"
        raise InputError(
            Problem(
                "an adapter on a model that is on this machine only: nobody else could load it",
                file=str(folder),
                hint=hint,
            )
        )
    subject = Subject(folder, manifest, run, adapter, notes.get("stop_ids") or ())
    contents = {name: _published(path, origin if adapter else {}) for name, path in sorted(chosen.items())}
    return Upload(subject, card(subject, to), contents)


def push(upload: Upload, to: str, *, private: bool) -> str:
    """Create the repository if it does not exist, and upload everything in one commit; returns the commit's address.

    The token comes from the environment (``HF_TOKEN``) or from ``hf auth login``; ``HF_ENDPOINT`` selects another hub.

    Raises:
        InputError: the repository exists with the other visibility.
        EnvironmentFault: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    contents: dict[str, Path | bytes] = {"README.md": upload.card.encode(), **upload.files}
    message = f"{upload.subject.manifest.stage}, pushed by align"
    api = HfApi()
    with _faults(to):
        try:  # ask with a time limit first, since the other calls have none
            _require_visibility(to, bool(api.repo_info(to, timeout=PATIENCE).private), private)
        except errors.HfHubHTTPError as error:  # some hubs answer with 404 only
            if not isinstance(error, errors.RepositoryNotFoundError) and error.response.status_code != 404:
                raise
            api.create_repo(to, private=private)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        return str(api.create_commit(to, operations, commit_message=message).commit_url)


@contextmanager
def _faults(to: str) -> Iterator[None]:
    """Turns errors of the client into this package's errors."""
    from huggingface_hub import errors

    try:
        yield
    except InputError:
        raise
    except errors.HFValidationError as error:
        raise InputError(f"--to {to}: {str(error).splitlines()[0][:200]}") from error
    except errors.OfflineModeIsEnabled as error:
        raise EnvironmentFault(f"{to}: the network is switched off", hint="unset HF_HUB_OFFLINE") from error
    except errors.LocalTokenNotFoundError as error:
        raise EnvironmentFault(f"{to}: no token", hint="set HF_TOKEN, or log in with `hf auth login`") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            hint = "set HF_TOKEN, or log in with `hf auth login`, with the right to write there"
            raise EnvironmentFault(f"{to}: the hub refuses access ({status})", hint=hint) from error
        reason = error.server_message or f"status {status}"
        raise EnvironmentFault(f"{to}: the hub refuses: {reason.splitlines()[0][:200]}") from error
    # The client's transport errors have no public base class; all of them mean the same here
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(f"{to}: the hub cannot be reached ({reason[:120]})") from error


def _require_name(to: str) -> None:
    if not _REPOSITORY.fullmatch(to) or ".." in to:
        raise InputError(f"--to {to[:80]}: a repository is written ORG/NAME")


def _require_visibility(to: str, is_private: bool, private: bool) -> None:
    """Raises InputError when the repository exists with the other visibility, so that a model that should be private is
    not uploaded to a public one."""
    if is_private != private:
        there, option = ("private", "--private") if is_private else ("public", "--public")
        raise InputError(
            f"{to} exists and is {there}; nothing was sent", hint=f"write {option}, or name another repository"
        )


def locate(source: str, runs_dir: Path, stage: str | None) -> tuple[Path, RunRecord | None]:
    """The folder of the artefact that a command names, and the run that it belongs to.

    Args:
        source: a run's name or folder, or the folder of a stage's result.
        stage: of the run; the last one that left a model when absent.

    Raises:
        InputError: there is no such run, stage or result.
    """
    path = Path(source).expanduser()
    if (path / MANIFEST).is_file():
        if stage is not None:
            raise InputError(f"--stage {stage[:80]}: {source} is the result of a stage already")
        run = path.absolute().parent.parent
        return path, read_run(run) if is_run(run) else None
    record = read_run(find_run(source, runs_dir))
    if stage is not None:
        result = record.stage(stage)
        if not result.folder.exists():
            raise InputError(f"stage {stage} has no result yet")
        return result.folder, record
    models = [other for other in record.stages if other.manifest is not None and other.manifest.type in MODELS]
    if not models:
        raise InputError(f"no stage of {record.folder} has left a model")
    return models[-1].folder, record


def _is_of_model(name: str) -> bool:
    """Does a file belong to the model? Files in subfolders do not: they are a value model, rollouts and the like."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in _MODEL_FILES)


def _models_of(run: RunRecord | None) -> str | None:
    names = [stage.name for stage in run.stages if stage.manifest and stage.manifest.type in MODELS] if run else []
    return f"stages with a model: {', '.join(names)}" if names else None


def _published(path: Path, origin: Mapping[str, Any]) -> Path | bytes:
    """The content to upload: without paths of this machine, and in an adapter's configuration with the base's hub id
    and revision."""
    if path.suffix != ".json" or path.name == "tokenizer.json" or path.name.endswith(".index.json"):
        return path
    value = _json(path)
    cleaned = _without_paths(value)
    if path.name == ADAPTER_CONFIG:
        cleaned |= {"base_model_name_or_path": origin["path"], "revision": origin.get("revision")}
    return path if cleaned == value else files.dump_json(cleaned).encode()


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(item, name) for name, item in value.items() if name != "base_from_here"}
    if isinstance(value, str) and key in _PATH_KEYS and Path(value).is_absolute():
        return Path(value).name
    return value


def _json(path: Path | None) -> dict[str, Any]:
    value = json.loads(path.read_bytes()) if path is not None else {}
    return value if isinstance(value, dict) else {}
