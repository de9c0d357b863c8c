"""Whether loading a model needs Python code from its folder. Imports transformers only when the folder names such
code."""

from __future__ import annotations

import json

from align.errors import InputError, Problem
from align.models.files.folder import ModelFolder

_PROBLEM = "wants its own Python code to be run, which align never does (auto_map)"
_HINT = "use a model that transformers knows"


def refuse_own_code(folder: ModelFolder) -> None:
    """A folder may name Python classes of its own (``auto_map``). That is fine when transformers has the same classes
    built in.

    Raises:
        InputError: transformers does not have them, or ``tokenizer_config.json`` is damaged.
    """
    if folder.config.get("auto_map"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if folder.config.get("model_type") not in CONFIG_MAPPING:
            raise InputError(Problem(_PROBLEM, file=str(folder.path / "config.json"), hint=_HINT))
    path = folder.path / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_bytes())
        name, wants = settings.get("tokenizer_class") or "", settings.get("auto_map")
    except (ValueError, AttributeError) as error:
        raise InputError(Problem(f"damaged: {error}"[:200], file=str(path))) from error
    if wants:
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        if all(tokenizer_class_from_name(known) is None for known in (name, f"{name}Fast")):
            raise InputError(Problem(_PROBLEM, file=str(path), hint=_HINT))
