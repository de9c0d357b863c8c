"""The proof that an engine holds the weights that it was given: where it is computed, and in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from align.rollout import weight_check
from align.rollout.weight_check import Arrived


class Here(Tensor):
    """A tensor that notes where it is asked to go, and what is done to it there."""

    went: list[Any]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.to and isinstance(arguments[1], torch.device):
            cls.went.append(arguments[1])
            return arguments[0]
        return super().__torch_function__(function, types, arguments, keywords or {})


def test_products_are_made_where_the_engine_computes() -> None:
    """The tensor goes to the GPU before it is multiplied, and what goes on to the engine is the one that is there."""
    Here.went = []
    given = torch.ones(3, 4).as_subclass(Here)
    gpu = torch.device("cuda", 0)
    (arrived,) = Arrived(gpu).seen([("a.weight", given)])
    assert Here.went == [gpu] and arrived[1] is given


@pytest.mark.parametrize("shape", [(7, 4), (2, 5, 4), (1, 4), (4,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_give_the_product_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """An embedding in fp32 as a whole would take 2.5 GB beside the engine's cache."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = weight_check._product(tensor)
    assert whole.dtype == torch.float32 and whole.numel() == (tensor.numel() // 4 if tensor.ndim > 1 else 4)
    monkeypatch.setattr(weight_check, "_STEP", 8)
    torch.testing.assert_close(weight_check._product(tensor), whole)
    if tensor.ndim > 1:
        vector = weight_check._vector(4, tensor).float()
        torch.testing.assert_close(whole, (tensor.float() * vector).sum(-1).flatten())
