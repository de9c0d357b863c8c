"""Running a recipe: what runs, what does not, why, and what is left when it
fails."""

from __future__ import annotations

import io
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align import files
from align.errors import AlignError, EnvironmentFault, InputError, Interrupted
from align.pipeline import artifacts
from align.pipeline.identity import redact
from align.pipeline.locks import RunLock
from align.pipeline.processes import StoppedWithRank0
from align.pipeline.runner import run_recipe
from align.pipeline.selection import Selection
from align.recipe.load import load_recipe
from tests.support.workshop import RECIPE, Workshop, snapshot


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Workshop:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Workshop(tmp_path, re.sub(r"\W", "_", request.node.name))


def edit_keeping_size_and_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"z"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_the_second_run_does_nothing(shop: Workshop) -> None:
    """Prints `up to date` for each stage; same bytes, same times."""
    result, lines = shop.run()
    assert lines == [f"{name}: running (first run)" for name in ("sft", "dpo", "last")]
    assert result.ran == ("sft", "dpo", "last")
    assert shop.hidden() == []
    assert list((shop.folder / "work").iterdir()) == []
    before = snapshot(shop.folder)
    result, lines = shop.run()
    assert lines == ["sft: up to date", "dpo: up to date", "last: up to date"]
    assert (result.ran, result.up_to_date) == ((), ("sft", "dpo", "last"))
    assert result.summaries["sft"] == {"attempts": 1}
    assert snapshot(shop.folder) == before
    assert shop.status() == {name: "up to date: " for name in ("sft", "dpo", "last")}


def test_the_folder_tells_how_it_came_about(shop: Workshop) -> None:
    """The recipe as run, with overrides, can be run again; each file is explained."""
    shop.run("stages.sft.train.learning_rate=2e-5", "stages.dpo.fail='012'")
    made = load_recipe(str(shop.folder / "recipe.yaml"))
    assert made.recipe == shop.load("stages.sft.train.learning_rate=2e-5", "stages.dpo.fail='012'").recipe
    readme = (shop.folder / "README.md").read_text()
    entries = {path.name for path in shop.folder.iterdir() if not path.name.startswith(".")} - {"README.md"}
    assert all(name in readme for name in entries)
    assert {"command", "packages", "started", "recipe", "root", "folder"} == json.loads(
        (shop.folder / "run.json").read_text()
    ).keys()
    manifest = artifacts.read_manifest(shop.folder / "stages" / "dpo")
    assert manifest.identity.inputs["stage:sft"] == artifacts.artefact_digest(shop.folder / "stages" / "sft")
    assert manifest.encoder == "e" * 64
    assert shop.events() == [(name, event) for name in ("sft", "dpo", "last") for event in ("started", "finished")]


def test_one_byte_upstream_reruns_all_that_follows_from_it(shop: Workshop) -> None:
    """Found although size and time of the file are the same; what does not depend on it is left alone."""
    shop.run()
    edit_keeping_size_and_time(shop.root / "a.jsonl")
    assert shop.status() == {
        "sft": "to run: input a.jsonl changed",
        "dpo": "waits: sft to run first",
        "last": "waits: dpo to run first",
    }
    _, lines = shop.run()
    assert lines == [
        "sft: running (input a.jsonl changed)",
        "dpo: running (input stage:sft changed)",
        "last: running (input stage:dpo changed)",
    ]
    (shop.root / "b.jsonl").write_text("changed\n")
    assert shop.run()[1][0] == "sft: up to date"


def test_a_result_that_comes_out_equal_reruns_nothing(shop: Workshop) -> None:
    """Artefacts count by content."""
    shop.recipe(sft=", constant: true")
    shop.run()
    _, lines = shop.run("stages.sft.train.learning_rate=2e-5")
    assert lines == [
        "sft: running (config changed: train.learning_rate 1e-5 -> 2e-5)",
        "dpo: up to date",
        "last: up to date",
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("stages.sft.seed=3", "config changed: seed 17 -> 3"),
        ("stages.sft.data=[{path: a.jsonl, limit: 5}]", "config changed: data.0.limit null -> 5"),
        ("stages.sft.policy=other", "config changed: policy null -> other)"),
        ("model.chat_template=t.jinja", "config changed: model.chat_template null -> t.jinja"),
    ],
)
def test_a_changed_config_is_named(shop: Workshop, override: str, reason: str) -> None:
    (shop.root / "other").mkdir()
    (shop.root / "other" / "config.json").write_text("{}")
    (shop.root / "t.jinja").write_text("x")
    shop.run()
    assert shop.run(override)[1][0].startswith(f"sft: running ({reason}")


def test_what_changes_no_result_runs_nothing(shop: Workshop) -> None:
    shop.run()
    _, lines = shop.run("stages.sft.train.report_to=[wandb]", "stages.sft.train.save_steps=5", "stages.sft.seed=17")
    assert lines[0] == "sft: up to date"


def test_the_model_counts_for_the_stages_that_start_from_it(shop: Workshop) -> None:
    """By content; and a stage that starts from another stage's policy does not follow from it twice."""
    shop.recipe(sft=", constant: true")
    shop.run()
    (shop.root / "base" / "config.json").write_text("[]")
    assert shop.run()[1] == ["sft: running (input base changed)", "dpo: up to date", "last: up to date"]


def test_the_code_of_a_third_partys_stage_counts(shop: Workshop) -> None:
    """Who edits a stage of their own and runs again wants to see the new result."""
    shop.run()
    source = shop.root / f"{shop.module}.py"
    source.write_text(source.read_text() + "# edited\n")
    assert shop.status()["sft"] == f"to run: input code:{shop.module} changed"


def test_a_damaged_output_is_remade(shop: Workshop) -> None:
    """Any byte, and the manifest itself."""
    shop.run()
    output = shop.folder / "stages" / "sft" / "config.json"
    good = snapshot(shop.folder / "stages" / "dpo")
    text = output.read_text()
    output.write_text(text[::-1])
    assert shop.run()[1] == ["sft: running (output damaged: config.json)", "dpo: up to date", "last: up to date"]
    assert output.read_text() == text
    assert snapshot(shop.folder / "stages" / "dpo") == good
    (output.parent / "manifest.json").unlink()
    assert shop.run()[1][0] == "sft: running (output damaged: manifest.json)"


def test_a_failed_stage_leaves_nothing_visible_and_stops_the_rest(shop: Workshop) -> None:
    """Downstream does not start; the next attempt has the work folder and goes on."""
    shop.recipe(dpo=", fail: once")
    with pytest.raises(RuntimeError, match="asked to fail"):
        shop.run()
    assert sorted(path.name for path in (shop.folder / "stages").iterdir()) == ["sft"]
    assert shop.hidden() == []
    assert shop.events()[-1] == ("dpo", "failed")
    result, lines = shop.run()
    assert lines == [
        "sft: up to date",
        "dpo: running (first run; going on from an earlier attempt)",
        "last: running (first run)",
    ]
    assert result.summaries["dpo"] == {"attempts": 2}
    assert list((shop.folder / "work").iterdir()) == []


def test_a_failure_keeps_the_earlier_result(shop: Workshop) -> None:
    """Nobody loses a good model to a typo; its manifest still says what it was made from."""
    shop.run()
    before = snapshot(shop.folder / "stages")
    with pytest.raises(RuntimeError):
        shop.run("stages.sft.fail=always")
    assert snapshot(shop.folder / "stages") == before
    assert shop.run()[1][0] == "sft: up to date"


def test_another_config_does_not_go_on_from_the_work_of_the_first(shop: Workshop) -> None:
    """Checkpoints belong to one identity."""
    with pytest.raises(RuntimeError):
        shop.run("stages.sft.fail=once")
    result, lines = shop.run(
        "stages.sft.fail=once",
        "stages.sft.train.save_steps=3",
        "stages.sft.train.learning_rate=1",
        "stages.sft.fail=''",
    )
    assert lines[0] == "sft: running (first run)"
    assert result.summaries["sft"] == {"attempts": 1}


def test_an_interrupted_stage_goes_on(shop: Workshop) -> None:
    """Exit 143 after SIGTERM; the same command continues."""
    shop.recipe(sft=", fail: signal")
    with pytest.raises(Interrupted) as caught:
        shop.run()
    assert caught.value.exit_code == 143
    assert shop.events()[-1] == ("sft", "interrupted")
    assert list((shop.folder / "stages").iterdir()) == []
    result, lines = shop.run()
    assert lines[0] == "sft: running (first run; going on from an earlier attempt)"
    assert result.summaries["sft"] == {"attempts": 2}


def test_a_signal_at_the_end_of_a_stage_stops_before_the_next(shop: Workshop) -> None:
    """What is finished is kept."""
    shop.recipe(sft=", fail: late signal")
    with pytest.raises(Interrupted, match="stopped before stage dpo") as caught:
        shop.run()
    assert caught.value.exit_code == 130
    assert shop.run()[1][0] == "sft: up to date"


def test_one_kind_runs_from_what_is_there(shop: Workshop) -> None:
    """`align dpo --recipe R`: a missing or outdated need is an error that names it, never a stale input."""
    kind = {f"{shop.module}:Other"}
    with pytest.raises(
        InputError, match=r"stages.sft: stage dpo needs .* stage sft, which is not up to date \(first run\)"
    ):
        shop.run(selection=Selection(kinds=kind))
    shop.run(selection=Selection(kinds={f"{shop.module}:Toy", f"{shop.module}:Other"}))
    shop.run()
    result, lines = shop.run("stages.dpo.seed=1", selection=Selection(kinds=kind, replace=True))
    assert lines == ["sft: up to date", "dpo: running (config changed: seed 17 -> 1)"]
    assert result.ran == ("dpo",)
    with pytest.raises(InputError, match=r"not up to date \(config changed"):
        shop.run("stages.sft.seed=1", selection=Selection(kinds=kind, replace=True))
    with pytest.raises(InputError, match="has no stage of kind ppo"):
        shop.run(selection=Selection(kinds={"ppo"}))


def test_only_one_run_at_a_time(shop: Workshop) -> None:
    shop.run()
    with RunLock(shop.folder), pytest.raises(EnvironmentFault, match=f"in use by pid {os.getpid()}"):
        shop.run()


def test_a_full_disk_in_a_stage_is_a_fault_of_the_environment(shop: Workshop) -> None:
    """Exit 3, nothing half-done left."""
    with pytest.raises(EnvironmentFault, match=r"No space left on device; disk full, [\d,]+ available"):
        shop.run("stages.sft.fail=disk")
    assert list((shop.folder / "stages").iterdir()) == []


def test_a_full_disk_while_a_failure_is_logged_does_not_hide_it(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def fault(operation: str, path: Path) -> None:
        if path.name == "history.jsonl":
            seen.append(path)
            if len(seen) == 2:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fault", fault)
    with pytest.raises(RuntimeError, match="asked to fail"):
        shop.run("stages.sft.fail=always")
    assert "warning: " in shop.printed.getvalue()


def test_what_a_stage_lacks_is_said(shop: Workshop) -> None:
    shop.recipe(text=RECIPE.replace(":Toy", ":Needy"))
    with pytest.raises(EnvironmentFault, match="stage sft needs the Python package a_package_that_is_not_there"):
        shop.run()
    shop.recipe(text=RECIPE.replace(":Toy", ":Lost"))
    with pytest.raises(InputError, match=f"the module {shop.module} has no nothing_here"):
        shop.run()
    shop.recipe(sft=", fail: link")
    with pytest.raises(AlignError, match="left a link"):
        shop.run()
    assert list((shop.folder / "stages").iterdir()) == []


def test_only_folders_of_our_own_are_touched(shop: Workshop) -> None:
    """A folder that happens to have the run's name, and a link that leads out, are refused."""
    (shop.folder / "stages").mkdir(parents=True)
    with pytest.raises(InputError, match="is not a run folder"):
        shop.run()
    (shop.folder / "stages").rmdir()
    shop.folder.rmdir()
    (shop.root / "elsewhere").mkdir()
    shop.folder.symlink_to(shop.root / "elsewhere")
    with pytest.raises(InputError, match="leads out of"):
        shop.run()
    shop.folder.unlink()
    shop.folder.write_text("a file")
    with pytest.raises(EnvironmentFault, match="toy: "):
        shop.run()


def test_secrets_are_written_nowhere(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from the recipe, nor the command line, nor the environment; a changed one is still a change."""
    monkeypatch.setenv("HF_TOKEN", "canary-in-env")
    monkeypatch.setattr(
        "sys.argv", ["align", "run", "stages.sft.api_key=canary-1", "--hf-token=canary-2", "https://me:canary-3@host/x"]
    )
    shop.run("stages.sft.api_key=canary-1")
    written = b"".join(path.read_bytes() for path in shop.folder.rglob("*") if path.is_file())
    assert b"canary" not in written
    _, lines = shop.run("stages.sft.api_key=canary-9")
    assert lines[0].startswith("sft: running (config changed: api_key <redacted ")
    assert redact({"num_memory_tokens": 3, "stop_token": "</s>", "where": {"lang": "a=b"}}) == {
        "num_memory_tokens": 3,
        "stop_token": "</s>",
        "where": {"lang": "a=b"},
    }


def test_odd_surroundings_are_no_obstacle(shop: Workshop) -> None:
    """LANG=C, no home folder, no folder for temporary files, and names with blanks, umlauts and Chinese."""
    (shop.root / "daten ü 甲.jsonl").write_text("{}\n")
    shop.recipe(text=RECIPE.replace("a.jsonl", "'daten ü 甲.jsonl'"))
    code = """
import sys
from pathlib import Path
from rich.console import Console
from align.pipeline.runner import run_recipe
from align.recipe.load import load_recipe
sys.path.insert(0, ".")
run_recipe(load_recipe("recipe.yaml"), runs_dir=Path("läufe 乙"), console=Console())
"""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    for expected in ("running (first run)", "up to date"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=shop.root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        assert done.stdout.splitlines() == [f"{name}: {expected}" for name in ("sft", "dpo", "last")]


class PairOfRanks:
    """Two ranks as threads: rank 0 puts, rank 1 takes."""

    def __init__(self, rank: int, box: queue.Queue[Any], gate: threading.Barrier) -> None:
        self.rank, self.world, self._box, self._gate = rank, 2, box, gate

    def broadcast_object(self, value: Any) -> Any:
        if self.rank == 0:
            self._box.put(value)
            return value
        return self._box.get(timeout=20)

    def barrier(self) -> None:
        self._gate.wait(timeout=20)


def both(shop: Workshop, *overrides: str, prepare: Callable[[], None] = lambda: None) -> tuple[list[Any], list[str]]:
    """The outcome of rank 0 and of rank 1, and what was printed."""
    box: queue.Queue[Any] = queue.Queue()
    gate = threading.Barrier(2)
    loaded = shop.load(*overrides)
    outcome: list[Any] = [None, None]
    printed = io.StringIO()

    def work(rank: int) -> None:
        try:
            console = Console(file=printed, width=200)
            outcome[rank] = run_recipe(loaded, runs_dir=shop.runs, console=console, ranks=PairOfRanks(rank, box, gate))
        except BaseException as error:
            outcome[rank] = error
            gate.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome, printed.getvalue().splitlines()


RANKED = """
from align.pipeline import runner
def run(spec, ctx):
    import threading
    path = ctx.work / f"{threading.get_ident()}-{ctx.out.name}"
    path.write_text("here")
    if not ctx.console.quiet:
        (ctx.out / "config.json").write_text("made by rank 0")
"""


def test_ranks_decide_together_and_rank_0_alone_publishes(shop: Workshop) -> None:
    """All ranks run the same stages with the same paths; one line is printed, not two."""
    (shop.root / f"{shop.module}_needy.py").write_text(RANKED)
    shop.recipe(text=RECIPE.replace(":Toy", ":Needy").replace(":Other", ":Needy"))
    (first, second), lines = both(shop)
    assert lines == [f"{name}: running (first run)" for name in ("sft", "dpo", "last")]
    assert first == second
    assert first.ran == ("sft", "dpo", "last")
    (first, second), lines = both(shop)
    assert lines == ["sft: up to date", "dpo: up to date", "last: up to date"]
    assert first == second


def test_an_error_on_rank_0_ends_every_rank_with_its_exit_code(shop: Workshop) -> None:
    shop.run()
    with RunLock(shop.folder):
        (first, second), _ = both(shop)
    assert isinstance(first, EnvironmentFault)
    assert isinstance(second, StoppedWithRank0)
    assert (first.exit_code, second.exit_code) == (3, 3)


def test_every_stage_begins_with_memory_of_its_own(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch is there: a stage that is up to date frees nothing."""
    import align.training.memory

    begun: list[None] = []
    monkeypatch.setattr(align.training.memory, "begin_stage", lambda: begun.append(None))
    (first, _), (second, _) = shop.run(), shop.run()
    assert (len(first.ran), len(second.ran), len(begun)) == (3, 0, 3)
