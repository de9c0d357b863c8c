"""Loading and saving without transformers' progress bars: align shows its own progress, and a log file is no place for
any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off for a while."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    gguf: Any = modeling_gguf_pytorch_utils

    # The GGUF reader takes its bar from tqdm itself, past transformers' switch.
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
    """Inside, transformers does not print its tables of tensors: what they say is looked at, and told in one line or
    refused."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
