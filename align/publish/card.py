"""Writing a model card in Markdown: what a model is, what it was made from and how, its results, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align import __version__
from align.errors import EnvironmentFault, InputError
from align.models.files.folder import HEAD
from align.pipeline.artifacts import Manifest
from align.recipe import reference_syntax
from align.recipe.schema import starting_field
from align.report.measures import headlines
from align.report.views.view import view_of
from align.runs.record import RunRecord, StageRecord
from align.terminal import counted

_POLICY = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}"){peft}
messages = [{{"role": "user", "content": "Who are you?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=128)[0]))
"""

_REWARD = """\
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModel.from_pretrained("{repo}"){peft}
head = load_file(hf_hub_download("{repo}", "{head}"))["weight"]
messages = [{{"role": "user", "content": "Who are you?"}}, {{"role": "assistant", "content": "A model."}}]
tokens = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
states = model(**tokens).last_hidden_state[0].detach().float()
# The token that ends the answer.
end = max(i for i, token in enumerate(tokens["input_ids"][0].tolist()) if token in {stops})
print(float(states[end] @ head[0]))
"""


@dataclass(frozen=True)
class Subject:
    """The model that a card describes."""

    folder: Path
    """The result of a stage."""
    manifest: Manifest
    run: RunRecord | None
    """The run it belongs to; None when the folder is not in a run."""
    adapter: bool
    """Is it an adapter, not a whole model?"""
    stop_ids: Sequence[int]

    @property
    def chain(self) -> tuple[StageRecord, ...]:
        """The stage and those that it depends on, in running order; empty without a run."""
        if self.run is None:
            return ()
        wanted = {self.manifest.stage}
        for stage in reversed(self.run.stages):
            if stage.name in wanted:
                wanted.update(stage.needs)
        return tuple(stage for stage in self.run.stages if stage.name in wanted)


def card(subject: Subject, repo: str) -> str:
    """The card of a model that will be published as ``repo``."""
    base = base_of(subject)
    head: dict[str, Any] = {"library_name": "peft" if subject.adapter else "transformers"}
    if base is not None and _is_hub_id(base):
        head["base_model"] = base
    licence = _licence(subject, base)
    if licence:
        head["license"] = licence
    reward = subject.manifest.type == "reward_model"
    head |= {
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": ["align", subject.manifest.identity.kind],
    }
    versions = ", ".join(f"{name} {version}" for name, version in sorted(subject.manifest.packages.items()))
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {repo.rpartition('/')[2]}",
        _what(subject, base),
        *(f"## Results\n\n{table}" for table in _results(subject)),
        *(f"## {title}\n\n{words}" for title, words in _of_the_kind(subject)),
        f"## Loading\n\n```python\n{_loading(subject, repo)}```",
        *(f"## Data\n\n{table}" for table in _data(subject)),
        *([f"## Recipe\n\n```yaml\n{subject.run.recipe.strip()}\n```"] if subject.run else []),
        f"## Versions\n\n{versions}",
    ]
    if not licence:
        sections.append(
            "## Licence\n\nNot known to the program that wrote this card. The base model's licence applies to what was"
            " made from it."
        )
    return "\n\n".join(sections) + "\n"


def base_of(subject: Subject) -> str | None:
    """The model that the first stage started from, as written in the recipe."""
    if subject.run is None:
        model = subject.manifest.identity.model
        return str(model["path"]) if model and model.get("path") else None
    stages, name = subject.run.tree["stages"], subject.manifest.stage
    for _ in stages:  # a chain has at most as many stages
        spec = stages.get(name)
        start = spec.get(starting_field(spec.get("kind"))) if isinstance(spec, Mapping) else None
        if not isinstance(start, str):
            break
        if not start.startswith("stage:"):
            return start
        name = start.removeprefix("stage:").strip()
    model = subject.run.tree.get("model")
    path = model.get("path") if isinstance(model, Mapping) else model
    return str(path) if path else None


def _is_hub_id(text: str) -> bool:
    return not text.startswith("package:") and isinstance(reference_syntax.parse(text), reference_syntax.HubRef)


def _what(subject: Subject, base: str | None) -> str:
    identity = subject.manifest.identity
    what = "A reward model" if subject.manifest.type == "reward_model" else "A language model"
    what += " (a LoRA adapter)" if subject.adapter else ""
    if base is None:
        name = None
    elif _is_hub_id(base) or base.startswith("package:"):
        name = base
    else:
        name = Path(base).name
    start = "" if name is None else f", starting from `{name}`"
    steps = [f"`{stage.name}` ({stage.kind})" for stage in subject.chain]
    chain = f" The stages that led to it: {', '.join(steps)}." if len(steps) > 1 else ""
    return f"{what}, made by {view_of(identity.kind).made_by(identity)}{start}, with align {__version__}.{chain}"


def _results(subject: Subject) -> Iterator[str]:
    """A table of held-out numbers, if there are any."""
    lines = [(stage.name, line) for stage in subject.chain for line in headlines(stage)]
    if lines:
        rows = [f"| {name}: {' | '.join((line.title, *line.cells[:2]))} |" for name, line in lines]
        yield "\n".join(["| | before | after |", "|---|---|---|", *rows])


def _of_the_kind(subject: Subject) -> Iterator[tuple[str, str]]:
    """The sections of the view of the stage's kind."""
    for stage in subject.chain:
        if stage.name == subject.manifest.stage:
            yield from view_of(stage.kind).card(stage)


def _loading(subject: Subject, repo: str) -> str:
    peft = "  # needs peft" if subject.adapter else ""
    if subject.manifest.type == "reward_model":
        return _REWARD.format(repo=repo, peft=peft, head=HEAD, stops=list(subject.stop_ids))
    return _POLICY.format(repo=repo, peft=peft)


def _data(subject: Subject) -> Iterator[str]:
    """A table of the data that the stages read, with counts if the stages reported them."""
    rows = []
    for stage in subject.chain:
        data = stage.report.get("data")
        if isinstance(data, Mapping) and isinstance(data.get("trees"), int):
            places = data.get("sources", {}).get("sources", ()) if isinstance(data.get("sources"), Mapping) else ()
            known = [place for place in places if isinstance(place, Mapping) and place.get("path")]
            names = ", ".join(
                f"`{place['path']}`" + (f" ({place['licence']})" if place.get("licence") else "") for place in known
            )
            rows.append(
                f"| {stage.name} | {names} | {counted(data['trees'], data.get('want', 'row'))} |"
                f" {data.get('tokens', 0):,} |"
            )
    if rows:
        yield "\n".join(["| stage | data | | tokens |", "|---|---|---|---|", *rows])


def _licence(subject: Subject, base: str | None) -> str | None:
    """The licence on the base model's card, if that is on this machine."""
    if base is None or subject.run is None:
        return None
    try:
        place = reference_syntax.resolve(base, Path(str(subject.run.about.get("root", "."))))
    except (InputError, EnvironmentFault):
        return None
    path = place / "README.md" if isinstance(place, Path) else _cached_card(place)
    try:
        text = path.read_text(encoding="utf-8") if path else ""
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None


def _cached_card(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "README.md")
    return Path(path) if isinstance(path, str) else None
