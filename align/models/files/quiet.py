"""Loading and saving without transformers' progress bars: align shows its own progress, and bars would clutter a log
file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    gguf: Any = modeling_gguf_pytorch_utils

    # The GGUF reader uses tqdm directly, which transformers' switch does not reach.
    bar, gguf.tqdm = gguf.tqdm, lambda items, **_: items
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        gguf.tqdm = bar
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def no_reports() -> Iterator[None]:
    """Inside, transformers does not print its tables of missing and unexpected tensors: the caller checks them, and
    reports them in one line or refuses the model."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
