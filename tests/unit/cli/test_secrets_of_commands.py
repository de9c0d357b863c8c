"""An address with a password, given to any command anywhere: it is printed nowhere and written nowhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from align import cli
from align.secrets import hide, in_address

URL = "https://user:c4nary@host/x?token=c4nary"
RECIPE = "name: r\nmodel: {model}\nstages:\n  sft: {{kind: sft, data: {data}}}\n"
COMMANDS = (
    *(
        (command, "r.yaml", f"{key}={URL}")
        for command in ("check", "plan", "run", "sft")
        for key in ("model", "stages.sft.data", "nothing")
    ),
    *((command, "r.yaml", "--debug", f"data.path={URL}") for command in ("check", "run")),
    *((command, URL) for command in ("check", "plan", "run", "chat", "show", "report", "verify", "eval")),
    ("check", "leak.yaml"),
    ("run", "leak.yaml", "--debug"),
    ("diff", URL, URL),
    ("score", URL, "rows.jsonl"),
    ("generate", URL, "--prompts", "rows.jsonl"),
    ("generate", "./nothing", "--prompts", URL),
    ("eval", "./nothing", "--data", URL),
    ("eval", "./nothing", "--data", "rows.jsonl", "--scorer", URL),
    ("data", "inspect", URL),
    ("data", "convert", URL, "--out", "o.jsonl"),
    ("push", URL, "--to", "org/name"),
    ("run", "r.yaml", "--only", URL),
)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda given: " ".join(given).replace(URL, "URL"))
def test_no_command_shows_a_secret(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    Path("rows.jsonl").write_text("{}\n")
    Path("r.yaml").write_text(RECIPE.format(model="./nothing", data="rows.jsonl"))
    Path("leak.yaml").write_text(RECIPE.format(model=f"'{URL}'", data=f"{{path: '{URL}', where: {{a: '{URL}'}}}}"))
    monkeypatch.setattr(sys, "argv", ["align", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and "error: " in printed.err
    assert "c4nary" not in printed.out + printed.err
    for path in set(Path().rglob("*")) - {Path("leak.yaml")}:
        assert not path.is_file() or b"c4nary" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("see https://me:pa55w0rd@host/x and more", "pa55w0rd"),
        ("https://pa55w0rd@host", "pa55w0rd"),
        ("s3://k:pa55@w0rd@bucket/x", "w0rd"),
        ("https://me:pa55/w0rd@host", "w0rd"),
        ("https://host/x?a=b&X-Amz-Signature=pa55w0rd#c", "pa55w0rd"),
        ("https://host/x?access_token=pa55w0rd", "pa55w0rd"),
        ("HTTPS://host/?API_KEY=pa55w0rd", "pa55w0rd"),
        ("token hf_abcdefghijklmnop was refused", "abcdefghijklmnop"),
        ("key sk-abcdefghijklmnopqrst", "abcdefghijklmnopqrst"),
    ],
)
def test_secrets_are_found_by_their_form(text: str, secret: str) -> None:
    assert secret in text and secret not in hide(text) and "<redacted " in hide(text)
    assert hide(hide(text)) == hide(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/x@y/z",
        "me@host",
        "a=b",
        "https://host/v1?page=2",
        "mask-sk-1",
        "stop_token: </s>",
        "package:a/b@c",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide(text) == text or "://" in text
    assert not in_address(text) or "@" in text
