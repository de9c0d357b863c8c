"""A user's folder with a recipe of three stages that cost nothing: for tests of what happens around stages."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.pipeline.status import status
from align.recipe.load import LoadedRecipe, load_recipe

STAGES = '''
"""A third party's stages: an artefact holds the digest of all that the stage was given, and asks for trouble when told to."""
import errno, os, signal, time
from pathlib import Path
from typing import ClassVar, Literal
from align import files
from align.errors import Interrupted
from align.recipe.schema import Data, DataSource, PolicyRef, Stage, Strict
from align.signals import stop_requested

class Train(Strict):
    learning_rate: float = 1e-5
    report_to: list[str] = []
    save_steps: int | None = None

class Toy(Stage):
    produces: ClassVar = "policy"
    implementation: ClassVar = "{module}:run"
    kind: Literal["{module}:Toy"]
    policy: PolicyRef | None = None
    data: Data
    train: Train = Train()
    constant: bool = False
    fail: str = ""
    api_key: str = ""

class Other(Toy):
    kind: Literal["{module}:Other"]

class Needy(Toy):
    implementation: ClassVar = "{module}_needy:run"
    kind: Literal["{module}:Needy"]

class Lost(Toy):
    implementation: ClassVar = "{module}:nothing_here"
    kind: Literal["{module}:Lost"]

def run(spec, ctx):
    given = [str(ctx.seed), spec.train.model_dump_json()]
    given += [files.digest_path(Path(ctx.resolve(source.path))) for source in spec.data]
    given.append(files.digest_path(Path(ctx.policy(spec.policy).path) / "config.json"))
    done = sorted(path.name for path in ctx.work.iterdir())
    (ctx.work / f"part-{{len(done)}}").write_text("x")
    (ctx.out / "partial").write_text("x")
    if spec.fail == "always" or (spec.fail == "once" and not done):
        raise RuntimeError("asked to fail")
    if spec.fail == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if spec.fail == "link":
        (ctx.out / "link").symlink_to("/etc")
    if spec.fail == "signal" and not done:
        os.kill(os.getpid(), signal.SIGTERM)
        while stop_requested() is None:
            time.sleep(0.001)
        raise Interrupted(stop_requested(), "saved")
    if spec.fail == "late signal":
        os.kill(os.getpid(), signal.SIGINT)
    (ctx.out / "partial").unlink()
    (ctx.out / "config.json").write_text("same" if spec.constant else files.digest_json(given))
    ctx.note({{"attempts": len(done) + 1}})
    ctx.encoder_digest = "e" * 64
'''

RECIPE = """
name: toy
model: base
stages:
  sft: {{kind: "{module}:Toy", data: [a.jsonl]{sft}}}
  dpo: {{kind: "{module}:Other", policy: "stage:sft", data: b.jsonl{dpo}}}
  last: {{kind: "{module}:Toy", policy: "stage:dpo", data: b.jsonl}}
"""


class Workshop:
    """A folder with a recipe, its data, and a package of stages."""

    def __init__(self, root: Path, module: str) -> None:
        self.root, self.module = root, module
        self.runs = root / "runs"
        (root / f"{module}.py").write_text(STAGES.format(module=module))
        (root / f"{module}_needy.py").write_text("import a_package_that_is_not_there\n")
        (root / "a.jsonl").write_text('{"prompt": "a"}\n')
        (root / "b.jsonl").write_text('{"prompt": "b"}\n')
        (root / "base").mkdir()
        (root / "base" / "config.json").write_text("{}")
        self.recipe()

    def recipe(self, sft: str = "", dpo: str = "", text: str = RECIPE) -> None:
        (self.root / "recipe.yaml").write_text(text.format(module=self.module, sft=sft, dpo=dpo))

    def load(self, *overrides: str) -> LoadedRecipe:
        return load_recipe("recipe.yaml", overrides)

    def run(self, *overrides: str, **options: Any) -> tuple[RunResult, list[str]]:
        printed = io.StringIO()
        self.printed = printed
        options.setdefault("selection", Selection(replace=True))
        result = run_recipe(
            self.load(*overrides), runs_dir=self.runs, console=Console(file=printed, width=40), **options
        )
        return result, printed.getvalue().splitlines()

    def status(self, *overrides: str, **selection: Any) -> dict[str, str]:
        found = status(self.load(*overrides), self.runs, Selection(**{"replace": True, **selection}))
        return {name: f"{s.state}: {s.words}" for name, s in found.items()}

    @property
    def folder(self) -> Path:
        return self.runs / "toy"

    def events(self) -> list[tuple[str, str]]:
        lines = (self.folder / "history.jsonl").read_text().splitlines()
        return [(line["stage"], line["event"]) for line in map(json.loads, lines)]

    def hidden(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob(".*") if path.name != ".align.lock")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def run_quietly(loaded: LoadedRecipe, runs: Path, **selection: Any) -> RunResult:
    """Run a recipe without a word."""
    return run_recipe(loaded, runs_dir=runs, console=Console(quiet=True), selection=Selection(**selection))
