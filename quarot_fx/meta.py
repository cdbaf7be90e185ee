"""Models on the meta device: shapes without data, which are enough to plan with.

Such a model is traced as if it were on the CPU. Operators choose layouts, and models their code, by device, and the
plan has to be the one that the same model gets with its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only


def is_on_meta(model: Callable[..., Any]) -> bool:
    """Whether some parameter or buffer of a model has no data."""
    return any(tensor.is_meta for tensor in _named_tensors(model).values())


class StandIns:
    """Fake CPU tensors that stand for meta tensors while a model is traced."""

    def __init__(self) -> None:
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id of a fake -> the fake, its original

    def call(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call a model with stand-ins for the meta tensors among its parameters, buffers and arguments."""
        args, kwargs = tree_map_only(torch.Tensor, self._of, (args, kwargs))
        tensors = {name: self._of(tensor) for name, tensor in _named_tensors(model).items() if tensor.is_meta}
        if isinstance(model, torch.nn.Module) and tensors:
            functional_call(model, tensors, args, kwargs)
        else:
            model(*args, **kwargs)

    def original(self, value: Any) -> Any:
        """Return the meta tensor that a value stands for, or the value itself."""
        return self._originals[id(value)][1] if id(value) in self._originals else value

    def _of(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        fake = fake_on(tensor, "cpu", self._fake_mode)
        self._originals[id(fake)] = fake, tensor
        return fake


def fake_on(tensor: torch.Tensor, device: torch.device | str, fake_mode: FakeTensorMode) -> torch.Tensor:
    """Return a fake tensor of a tensor's shape, strides and dtype that says that it is on a device."""
    with fake_mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _named_tensors(model: Any) -> dict[str, torch.Tensor]:
    if not isinstance(model, torch.nn.Module):
        return {}
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
