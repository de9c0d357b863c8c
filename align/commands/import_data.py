"""Converting declarations of data in other tools to sources of a recipe. Keys without a counterpart are listed.

It reads LLaMA-Factory's dataset_info.json, axolotl's ``datasets:``, and ms-swift's ``hf::id:subset#500`` with its
columns. Sources: LLaMA-Factory's data/README.md and data/parser.py, axolotl's documentation of dataset formats,
ms-swift's of ``--dataset`` and ``--columns``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from align.data.formats.column_names import yaml_line
from align.data.messages.messages import ROLES
from align.errors import InputError, Problem
from align.recipe.reference_syntax import is_data

Keys = dict[str, Any]


@dataclass
class Imported:
    """One data set of a declaration."""

    name: str
    source: Keys | None
    """A source of a recipe; None when it cannot be converted, for the reason in the notes."""
    notes: list[str] = field(default_factory=list)
    """``key: why it has no counterpart``."""


def as_yaml(data_sets: Iterable[Imported], whence: str) -> str:
    """The sources as the ``data`` of a stage, with the notes as comments.

    Raises :class:`InputError` when none of the data sets can be converted.
    """
    data_sets = list(data_sets)
    if all(one.source is None for one in data_sets):
        reasons = [Problem(note, file=whence, key=one.name) for one in data_sets for note in one.notes]
        raise InputError(reasons or [Problem("0 data sets", file=whence)])
    lines = [f"# from {whence}", "data:"]
    for one in data_sets:
        if one.source is not None:
            lines += [f"  # {one.name}", f"  - {yaml_line(one.source)}"]
    notes = [f"#   {one.name}: {note}" for one in data_sets for note in one.notes]
    return "\n".join([*lines, *(["# without a counterpart:"] if notes else []), *notes]) + "\n"


def _joined(*places: str | None, by: str) -> str:
    """The only place, or a text with the given places; for an empty place its line break is left out too."""
    given = [place for place in places if place]
    return given[0] if len(given) == 1 else by.join(f"{{{place}}}" for place in given)


def _noted(entry: Mapping[str, Any], known: Mapping[str, str], notes: list[str]) -> None:
    notes += [f"{key}: {why}" for key, why in known.items() if entry.get(key) not in (None, False, "", [], {})]


# LLaMA-Factory

_LF_NONE = {
    "file_sha1": "older versions compare it; a run's manifest records what the file holds",
    "folder": "a folder inside a hub data set cannot be named",
    "cloud_file_name": "nothing is read from an address: copy the file",
    "load_from": "the path says it",
}
_LF_MEDIA = ("images", "videos", "audios")
_LF_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
_LF_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "function_tag": "function_call",
}


def llama_factory(declared: Mapping[str, Any], folder: PurePath, names: Iterable[str] = ()) -> list[Imported]:
    """The entries of a dataset_info.json with these names, or all of them. ``folder`` is the folder of the file and of
    its data files.

    Raises :class:`InputError` for an unknown name.
    """
    wanted = list(names) or list(declared)
    if unknown := [name for name in wanted if name not in declared]:
        raise InputError(f"no data set `{unknown[0][:60]}`", hint=f"there are {', '.join(list(declared)[:10])}")
    return [_lf_entry(name, declared[name], folder) for name in wanted]


def _lf_entry(name: str, entry: Any, folder: PurePath) -> Imported:
    if not isinstance(entry, Mapping):
        return Imported(name, None, ["is no object"])
    notes: list[str] = []
    _noted(entry, _LF_NONE, notes)
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    notes += [f"columns.{key}: a text model cannot take it" for key in _LF_MEDIA if columns.get(key)]
    hub = entry.get("hf_hub_url")
    if not hub and not entry.get("file_name"):
        where = next((key for key in ("ms_hub_url", "om_hub_url", "script_url") if entry.get(key)), None)
        why = "a program is not run" if where == "script_url" else "another hub: copy the data"
        return Imported(name, None, [f"{where}: {why}" if where else "names neither file_name nor hf_hub_url", *notes])
    source: Keys = {"path": hub or str(folder / str(entry["file_name"]))}
    for key in ("subset", "split", "revision"):
        if value := entry.get(key):
            if hub:
                source[key] = value
            elif (key, value) != ("split", "train"):
                notes.append(f"{key}: a file has none")
    mapping = (_lf_alpaca if entry.get("formatting", "alpaca") == "alpaca" else _lf_turns)(entry, columns, tags, notes)
    if mapping is None:
        return Imported(name, None, notes)
    mapping |= {key: columns[key] for key in ("system", "tools") if columns.get(key)}
    source["format"] = mapping
    if entry.get("num_samples"):
        source["limit"] = entry["num_samples"]
        notes.append(
            "num_samples: a random sample there, repeated where it is larger than the set; `limit` takes the first rows"
        )
    if undeclared := [key for key in ("system", "tools") if not columns.get(key)]:
        notes.append(
            f"a column {' or '.join(undeclared)} that is not declared is not read there; here it is, unless it is"
            " ignored"
        )
    return Imported(name, source, notes)


def _lf_alpaca(
    entry: Mapping[str, Any], columns: Mapping[str, Any], tags: Mapping[str, Any], notes: list[str]
) -> Keys | None:
    given = columns or {"prompt": "instruction", "query": "input", "response": "output"}
    if not given.get("prompt"):
        notes.append("columns.prompt: is missing")
        return None
    asked = _joined(given["prompt"], given.get("query"), by="\n")
    prompt: Any = [given["history"], asked] if given.get("history") else asked
    if entry.get("ranking"):
        return {
            "prompt": prompt,
            "chosen": given.get("chosen", "chosen"),
            "rejected": given.get("rejected", "rejected"),
        }
    if not given.get("response"):
        notes.append("columns.response: is missing, so these are texts for pre-training, or prompts")
        return None
    answered = {"prompt": prompt, "completion": given["response"]}
    return {**answered, "better": {"label": given["kto_tag"]}} if given.get("kto_tag") else answered


def _lf_turns(
    entry: Mapping[str, Any], columns: Mapping[str, Any], tags: Mapping[str, Any], notes: list[str]
) -> Keys | None:
    if entry.get("formatting") == "openai":
        notes.append('formatting: openai adds "detailed thinking off" to the system there; here nothing is added')
    elif entry.get("formatting") != "sharegpt":
        notes.append(f"formatting: {str(entry.get('formatting'))[:40]} is not known")
        return None
    turns: Keys = {}
    own = {**_LF_TAGS, **tags}
    if own["role_tag"] not in ("from", "role"):
        turns["role"] = own["role_tag"]
    if own["content_tag"] not in ("value", "content"):
        turns["content"] = own["content_tag"]
    roles = {ours: [tags[key]] for key, ours in _LF_ROLES.items() if tags.get(key) and ROLES.get(tags[key]) != ours}
    if roles:
        turns["roles"] = roles
    if ROLES.get(own["function_tag"]) != "call":
        notes.append(f"tags.function_tag: {own['function_tag']} is no name of a call; rename it to function_call")
    place = columns.get("messages") or "conversations"
    if entry.get("ranking"):
        if turns:
            notes.append("tags: they are read in the prompt; chosen and rejected must have usual names")
        mapping: Keys = {
            "prompt": place,
            "chosen": columns.get("chosen", "chosen"),
            "rejected": columns.get("rejected", "rejected"),
        }
    else:
        mapping = {"messages": place}
        if columns.get("kto_tag"):
            mapping["better"] = {"label": columns["kto_tag"]}
    return {**mapping, **({"turns": turns} if turns else {})}


# axolotl

_AX_NONE = {
    "shards": "a part is taken with `limit`",
    "shards_idx": "a part is taken with `limit`",
    "preprocess_shards": "rows are read one at a time",
    "message_field_training_detail": "parts of a message are not trained apart",
    "train_on_eot": "the end of a turn is trained with the turn",
    "chat_template": "the model's own template, or model.chat_template, is for all data",
    "chat_template_jinja": "the model's own template, or model.chat_template, is for all data",
    "conversation": "the model's own template is used",
    "trust_remote_code": "a program is not run",
    "field_human": "`turns` names the parts of a turn",
    "field_model": "`turns` names the parts of a turn",
}
_AX_PAIRS = {
    "intel": {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"},
    "icr": {"prompt": "input", "chosen": "chosen", "rejected": "rejected", "system": "system"},
    "prompt_pairs": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system"},
    "argilla": {
        "prompt": "instruction",
        "chosen": "chosen_response",
        "rejected": "rejected_response",
        "system": "system",
    },
    "ultra": {"chosen": "chosen", "rejected": "rejected"},
    "argilla_chat": {"chosen": "chosen", "rejected": "rejected"},
}
_AX_TEXT = "renders a prompt text of its own; here the model's template does, so the tokens are others"
_AX_OWN = (
    "test_datasets",
    "pretraining_dataset",
    "dataset_prepared_path",
    "val_set_size",
    "split_thinking",
    "train_on_inputs",
)


def axolotl(declared: Mapping[str, Any], names: Iterable[str] = ()) -> list[Imported]:
    """The entries of ``datasets:`` of an axolotl recipe whose path is among the names, or all. Raises
    :class:`InputError`."""
    entries = [entry for entry in declared.get("datasets") or [] if isinstance(entry, Mapping)]
    wanted = set(names)
    if unknown := wanted - {str(entry.get("path")) for entry in entries}:
        raise InputError(f"no data set `{sorted(unknown)[0][:60]}`", hint="they are named by their path")
    pairs = declared.get("rl") is not None or declared.get("reward_model") is True
    data_sets = [_ax_entry(entry, pairs=pairs) for entry in entries if not wanted or entry.get("path") in wanted]
    left = [
        f"{key}: belongs to no source; eval_data, held-out rows and the cache are the recipe's"
        for key in _AX_OWN
        if declared.get(key)
    ]
    return [*data_sets, Imported("the recipe", None, left)] if left else data_sets


def _ax_entry(entry: Mapping[str, Any], *, pairs: bool) -> Imported:
    name, notes = str(entry.get("path")), list[str]()
    _noted(entry, _AX_NONE, notes)
    source: Keys = {"path": name}
    files = entry.get("data_files")
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    if files is not None:
        if name in ("json", "csv", "parquet", "arrow", "text") and isinstance(files, str):
            source["path"] = name = files
        else:
            notes.append("data_files: name each file as a source of its own")
    if name.startswith(("s3://", "gs://", "gcs://", "https://", "http://", "az://", "oci://")):
        return Imported(name, None, ["path: nothing is read from an address: copy the file", *notes])
    renamed = {"name": "subset", "split": "split", "revision": "revision"}
    local = is_data(name)
    for key, ours in renamed.items():
        if value := entry.get(key):
            if local and (key, value) != ("split", "train"):
                notes.append(f"{key}: a file has none")
            elif not local:
                source[ours] = value
    mapping = _ax_mapping(entry, notes, pairs=pairs)
    if mapping is None:
        return Imported(name, None, notes)
    return Imported(name, {**source, "format": mapping}, notes)


def _ax_mapping(entry: Mapping[str, Any], notes: list[str], *, pairs: bool) -> Keys | None:
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        if "format" in kind or "no_input_format" in kind:
            notes.append(f"type.format: {_AX_TEXT}")
        if pairs:
            given = {ours: kind.get(theirs, ours) for ours, theirs in _AX_FIELDS.items()}
            return {**given, **({"system": kind["field_system"]} if kind.get("field_system") else {})}
        asked = _joined(kind.get("field_instruction", "instruction"), kind.get("field_input"), by="\n\n")
        answered = {"prompt": asked, "completion": kind.get("field_output", "output")}
        return {**answered, **({"system": kind["field_system"]} if kind.get("field_system") else {})}
    first, _, second = str(kind).partition(".")
    if first in ("chatml", "llama3", "zephyr") and second in _AX_PAIRS:
        return dict(_AX_PAIRS[second])
    if first in ("chat_template", "bradley_terry"):
        return _ax_turns(entry, notes, pairs=pairs or first == "bradley_terry")
    if first == "alpaca":
        notes.append(f"type: {_AX_TEXT}")
        return {"prompt": "{instruction}\n\n{input}", "completion": "output"}
    if first == "sharegpt":
        return {"messages": "conversations"}
    known = {
        "completion": "plain texts are for pre-training",
        "input_output": "segments with their own loss are not read",
    }
    notes.append(f"type: {known.get(first, f'{str(kind)[:40]} is not known; say what the columns are with `format`')}")
    return None


_AX_FIELDS = {"prompt": "field_prompt", "chosen": "field_chosen", "rejected": "field_rejected"}


def _ax_turns(entry: Mapping[str, Any], notes: list[str], *, pairs: bool) -> Keys:
    turns: Keys = {}
    properties = entry.get("message_property_mappings") or {}
    for part in ("role", "content"):
        if properties.get(part, part) != part:
            turns[part] = properties[part]
    for key, ours in (("field_thinking", "reasoning"), ("message_field_training", "train")):
        if entry.get(key) or (key == "message_field_training" and properties.get("training")):
            turns[ours] = entry.get(key) or properties["training"]
    roles: Keys = {}
    for ours, theirs in (entry.get("roles") or {}).items():
        listed = theirs if isinstance(theirs, list) else [theirs]
        if ours in ("system", "user", "assistant", "tool") and any(ROLES.get(one) != ours for one in listed):
            roles[ours] = listed
    if entry.get("drop_system_message"):
        roles["system"] = []
    if roles:
        turns["roles"] = roles
    if entry.get("roles_to_train") not in (
        None,
        [],
        ["assistant"],
        ["gpt"],
        ["assistant", "gpt"],
        ["gpt", "assistant"],
    ):
        notes.append("roles_to_train: only the assistant is trained on")
    if entry.get("train_on_eos") not in (None, "turn"):
        notes.append("train_on_eos: the end of every trained turn is trained")
    place = entry.get("field_messages", "messages")
    tools = {"tools": entry["field_tools"]} if entry.get("field_tools") else {}
    if pairs:
        mapping: Keys = {
            "prompt": place,
            "chosen": entry.get("field_chosen", "chosen"),
            "rejected": entry.get("field_rejected", "rejected"),
        }
    else:
        mapping = {"messages": place}
    return {**mapping, **tools, **({"turns": turns} if turns else {})}


# ms-swift

_SWIFT = re.compile(r"(?:(?P<hub>hf|ms|HF|MS)::)?(?P<path>[^:#]+)(?::(?P<subsets>[^#]+))?(?:#(?P<number>\d+))?")
_SWIFT_NAMES = {"query": "prompt", "prompt": "prompt", "response": "completion", "output": "completion"}
_SWIFT_KNOWN = (
    "query",
    "response",
    "system",
    "history",
    "messages",
    "rejected_response",
    "rejected_messages",
    "label",
    "tools",
    "answer",
)


def swift(text: str, columns: Mapping[str, str] | None = None) -> list[Imported]:
    """``hf::id:subset/subset#500``: a source for each subset. ``columns`` are as ``--columns`` has them: ``{"their
    column": "query"}``.

    Raises :class:`InputError` for a text of another shape.
    """
    match = _SWIFT.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"`{text[:80]}` is no data set as ms-swift writes it", hint="for example hf::org/name:subset#500"
        )
    notes: list[str] = []
    local = is_data(match["path"])
    if not local and (match["hub"] or "ms").lower() != "hf":
        notes.append("path: without hf:: it is on another hub; is it on this one too?")
    source: Keys = {"path": match["path"]}
    mapping = _swift_mapping(dict(columns or {}), notes)
    if mapping:
        source["format"] = mapping
    if match["number"]:
        source["limit"] = int(match["number"])
        notes.append("#: a random sample there, repeated where it is larger than the set; `limit` takes the first rows")
    subsets = (match["subsets"] or "").split("/") if match["subsets"] else [None]
    if local and match["subsets"]:
        notes.append("subset: a file has none")
        subsets = [None]
    names = [match["path"] if subset is None else f"{match['path']}:{subset}" for subset in subsets]
    return [
        Imported(name, {**source, **({} if subset is None else {"subset": subset})}, notes if not number else [])
        for number, (name, subset) in enumerate(zip(names, subsets, strict=True))
    ]


def _swift_mapping(columns: dict[str, str], notes: list[str]) -> Keys:
    """The mapping for ms-swift's ``--columns``, which renames columns to names with fixed roles."""
    notes += [
        f"columns.{theirs}: {role} has no counterpart"
        for theirs, role in columns.items()
        if role not in (*_SWIFT_KNOWN, *_SWIFT_NAMES)
    ]
    by_role = {_SWIFT_NAMES.get(role, role): theirs for theirs, role in columns.items()}
    if not by_role:
        return {}
    extra: Keys = {key: by_role[key] for key in ("system", "tools") if key in by_role}
    label: Keys = {"better": {"label": by_role["label"]}} if "label" in by_role else {}
    worse = by_role.get("rejected_response") or by_role.get("rejected_messages")
    if "messages" in by_role and worse is None:
        return {"messages": by_role["messages"], **extra, **label}
    if "messages" in by_role:
        place = by_role["messages"]
        return {"prompt": f"{place}[:-1]", "chosen": f"{place}[-1]", "rejected": worse, **extra}
    asked = by_role.get("prompt", "query")
    prompt: Any = [by_role["history"], asked] if "history" in by_role else asked
    if worse is not None:
        return {"prompt": prompt, "chosen": by_role.get("completion", "response"), "rejected": worse, **extra}
    return {"prompt": prompt, "completion": by_role.get("completion", "response"), **extra, **label}
