"""Calls that run what somebody else wrote, or open what they should not: none of them is in the
package."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.root import ROOT

PACKAGE = ROOT / "align"
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp"),
    *("torch.load", "torch.save", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
}
TRUE_ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code"}


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines and what is there."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"import {name}") for name in names if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield node.lineno, called
            for keyword in node.keywords:
                if keyword.arg in TRUE_ARGUMENTS and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield node.lineno, "a listener for other machines"


def test_nothing_of_the_kind_is_called() -> None:
    found = [
        f"{path.name}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in dangers(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        *(
            "import pickle",
            "from joblib import load",
            "eval('1')",
            "os.system('ls')",
            "subprocess.run('ls', shell=True)",
        ),
        *(
            "torch.load(path)",
            "np.load(path, allow_pickle=flag)",
            "yaml.load(text)",
            "AutoModel.from_pretrained(x, trust_remote_code=True)",
        ),
        "serve('0.0.0.0')",
    ],
)
def test_the_finder_sees_them(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def test_the_finder_lets_pass_what_is_safe() -> None:
    assert not list(
        dangers(ast.parse("model.eval()\nyaml.safe_load(x)\nnp.load(x, allow_pickle=False)\nsubprocess.run(['ls'])"))
    )
