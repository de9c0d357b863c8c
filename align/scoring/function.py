"""A user's own function as a scorer: `reward: package.module:function`."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from align.errors import InputError
from align.recipe.reference_syntax import import_object
from align.scoring.scorer import Answer, require_scores


class CalledScorer:
    """Calls ``function(answers: list[Answer]) -> Sequence[float]``, where higher is better, and checks the result.

    Raises InputError when the function cannot be imported.
    """

    def __init__(self, function: str) -> None:
        self.name = function
        self._function = import_object(function)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The function's score of each answer. Raises InputError when it fails, or does not return a finite number for
        each."""
        if not answers:
            return []
        try:
            scores = self._function(list(answers))
            scores = list(scores)
        except Exception as error:  # any error in the user's function is reported with its place
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            raise InputError(
                f"the scorer {self.name} raised {type(error).__name__}: {str(error)[:200]} ({where})"
            ) from error
        return require_scores(self.name, scores, len(answers))
