"""The Dockerfile, without Docker: it copies what is there, calls what is there, runs as a user without privileges, and
has no secrets in it."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator

from tests.support.root import ROOT

TARGETS = ("cpu", "cuda")


def instructions() -> Iterator[tuple[str, str, str]]:
    """(stage, instruction, rest) in order, comments left out and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    stage = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        yield stage, word, rest


def of(stage: str, instruction: str) -> list[str]:
    """What follows each such instruction of a stage."""
    return [rest for found, word, rest in instructions() if (found, word) == (stage, instruction)]


def sources() -> list[str]:
    """Everything that is copied from the checkout."""
    copied = [shlex.split(rest) for _, word, rest in instructions() if word in ("COPY", "ADD")]
    return [name for words in copied for name in words[:-1] if not name.startswith("--")]


def test_what_is_copied_is_there_and_is_let_through() -> None:
    """.dockerignore lets exactly that through."""
    assert sources() and all((ROOT / name).exists() for name in sources())
    ignored = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert ignored[0] == "*"
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(sources())


def test_what_the_package_is_built_from_is_copied() -> None:
    """Files that pyproject.toml names, the installer's lists, and what an editable installation reads in place."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = [project["project"]["readme"], *project["project"]["license-files"], "requirements/cuda.txt"]
    named += project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    copied = set(sources())
    assert [name for name in named if name.partition("/")[0] not in copied] == []


def test_each_target_installs_its_own_pins_without_privileges() -> None:
    assert [rest for _, word, rest in instructions() if word == "FROM"][1:] == [f"base AS {t}" for t in TARGETS]
    for target in TARGETS:
        words = [(word, rest) for stage, word, rest in instructions() if stage == target]
        install = ("RUN", f"python requirements/install.py {target}")
        assert install in words and words.index(("USER", "1000:1000")) < words.index(install)
        assert of(target, "USER") == ["1000:1000"]
    installer = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "install.py" in line)
    assert "requirements/install.py" in installer


def test_the_default_command_is_that_of_make_doctor() -> None:
    doctor = re.search(r"^doctor:.*\n\t@\.venv/bin/(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert doctor
    for target in TARGETS:
        assert [json.loads(rest) for rest in of(target, "CMD")] == [doctor[1].split()]
    assert any("PATH=/align/.venv/bin:" in rest for rest in of("base", "ENV"))
    assert of("base", "WORKDIR") == ["/align"]


def test_no_secrets_are_built_in() -> None:
    """No argument or variable is named like one: both stay readable in an image's history."""
    named = " ".join(rest for _, word, rest in instructions() if word in ("ARG", "ENV"))
    assert not re.search("token|key|secret|password|credential", named, re.I)
