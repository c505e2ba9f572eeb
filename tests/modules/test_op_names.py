"""What a module says it calls is what it calls: reports on who serves a model go by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from octavo.modules import QuantModule
from tests.modules.test_modules import KINDS, Attention, whole
from tests.tiny_models import build, llama, mixtral, tokens


class Calls(TorchDispatchMode):
    """The ops of octavo that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "octavo":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def assert_says_what_it_calls(model: nn.Module, *args: Any) -> None:
    with Calls() as calls:
        model(*args)
    said = {name for module in model.modules() if isinstance(module, QuantModule) for name in module.op_names}
    assert calls.names == said != set()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str) -> None:
    assert_says_what_it_calls(*whole(kind))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "o1", "o2", "o3"])
def test_int8_inputs(scheme: str) -> None:
    model, ids = build(llama), tokens()
    stats = octavo.calibrate(model, [ids]) if scheme in ("w8a8-static", "o3") else None
    octavo.quantize(model, scheme, stats=stats)
    model.set_attn_implementation("sdpa")  # octavo's calls an op, and is no module
    assert_says_what_it_calls(model, ids)


@pytest.mark.parametrize(
    "make", [Attention, lambda: nn.LSTM(8, 8), lambda: nn.GRUCell(8, 8)], ids=["attention", "LSTM", "cell"]
)
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_attentions_and_recurrent_layers(make: Callable[[], nn.Module], scheme: str) -> None:
    model = nn.Sequential(make())
    octavo.quantize(model, scheme)
    assert_says_what_it_calls(model, torch.randn(3, 8))


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_experts(scheme: str) -> None:
    model = build(mixtral)
    octavo.quantize(model, scheme)
    model.set_attn_implementation("sdpa")
    assert_says_what_it_calls(model, tokens())
