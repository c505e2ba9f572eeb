"""A tensor subclass for keys or values that are stored as int8 codes.

The attention functions of this package use the codes. For any other operation the tensor is dequantized first, so that
whatever else a model does with the contents of its cache gets the numbers code * scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from octavo.errors import OctavoError

__all__ = ["Int8States"]


class Int8States(Tensor):
    """Keys or values [B, KV, S, D] of dtype `dtype`. codes: int8 [B, KV, S, D]. scale: fp32 [B, KV, S, 1]."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8States:
        self: Int8States = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)  # type: ignore[attr-defined]
        self.codes, self.scale = codes, scale
        return self

    def dequantized(self) -> Tensor:
        """code * scale in fp32, rounded to the dtype: [B, KV, S, D]."""
        return (self.codes * self.scale).to(self.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func._schema.is_mutable and isinstance(args[0], Int8States):
            raise OctavoError(
                f"{func} writes to keys or values that an Int8Cache holds as codes; have the model write to a copy "
                "(x = x * 2, not x *= 2), or leave its cache to the model"
            )
        args, kwargs = tree_map_only(Int8States, Int8States.dequantized, (args, kwargs or {}))
        return func(*args, **kwargs)
