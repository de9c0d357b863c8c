"""Data sets on the Hugging Face hub, or in its cache on this machine."""

from __future__ import annotations

from typing import Any

from align.data.strict_json import clip
from align.errors import EnvironmentFault, InputError, Problem
from align.recipe.schema import DataSource

TIMEOUT_S = 10.0
"""Seconds to wait for the hub to say that a data set exists, before only the cache is used."""


def load_split(name: str, source: DataSource) -> Any:
    """The split of a hub data set that ``source`` names, as a ``datasets.Dataset``, downloaded or from the cache.

    No code of a data set is run (``datasets`` no longer can). Without a network ``datasets`` would retry for 23 s
    before it uses its cache; here a short request to the hub decides that first.

    Raises :class:`InputError` when there is no such data set, subset, split or access; :class:`EnvironmentFault` when
    the hub cannot be reached and the cache does not have it.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hint = "a private or gated one needs a token; a local path is given with its suffix, or as ./NAME"
    absent = InputError(Problem("no such data set on the hub, or no access to it", file=name, hint=hint))
    unreachable: Exception | None = None
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise absent from error
    except Exception as error:  # an error of any HTTP library; reported below, unless the cache has the data
        unreachable = error
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or unreachable is not None
    try:
        return datasets.load_dataset(name, source.subset, split=source.split or "train", revision=source.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise absent from error
    except (ConnectionError, FileNotFoundError) as error:
        what = (
            f"cannot reach the hub ({type(unreachable or error).__name__}), and the cache does not have this data set"
        )
        hint = "give a local file, or download it where there is a network"
        raise EnvironmentFault(Problem(what, file=name, hint=hint)) from error
    # An unknown split, a missing choice of configuration, or a data set that is a program
    except (ValueError, RuntimeError) as error:
        raise InputError(Problem(clip(str(error), 300), file=name)) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
