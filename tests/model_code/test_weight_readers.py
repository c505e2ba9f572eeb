"""Which layers are read instead of called: found in all the ways that code has, and nowhere else."""

from __future__ import annotations

import copy
import functools
import linecache
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.errors import OctavoWarning
from octavo.model_code.weight_readers import asked_for_dtype_or_shape, class_testers, used_in_products, weight_readers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.attention = nn.MultiheadAttention(4, 2)
        self.experts = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})


# -- ways to read -----------------------------------------------------------------------------------------------------


class MultipliesByIt(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.head.weight.T


class InitialState(Base):
    def initial_state(self, x: Tensor) -> Tensor:  # no constructor either
        return x @ self.proj.weight

    def init_hidden(self, x: Tensor) -> Tensor:
        return x @ self.head.weight


class AnotherNameForSelf(Base):
    def forward(this, x: Tensor) -> Tensor:
        return x @ this.proj.weight


class Deep(Base):
    def helper(self) -> Any:
        return self.blocks[1].up.weight.abs()


class AnyIndex(Base):
    def forward(self, x: Tensor, i: int) -> Tensor:
        return x @ self.blocks[i].up.weight


class Loop(Base):
    def forward(self, x: Tensor) -> None:
        for block in self.blocks:
            block.down.weight.div_(2)


class EnumeratedLoop(Base):
    def forward(self, x: Tensor) -> None:
        for i, block in enumerate(self.blocks[:2]):
            block.down.weight.div_(2**i)


class ZippedLoop(Base):
    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [x @ block.up.weight for x, block in zip(xs, self.blocks, strict=True)]


class LoopOverWritten(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.proj, self.blocks[0].up):
            x = x @ layer.weight.T
        products = [x @ each.weight for each in [*self.experts.values(), self.head]]
        return x + sum(products)


class LoopOverChildren(Base):
    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.blocks.children()):
            x = x @ block.up.weight
        for _, layer in self.experts.items():
            x = x @ layer.weight
        for _, part in self.blocks[0].named_children():
            x = x @ part.weight
        return x


class LoopOverAll(Base):
    def forward(self, x: Tensor) -> Tensor:
        return sum((x @ part.weight for part in self.experts.modules() if isinstance(part, nn.Linear)), x)


class ByString(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(self.blocks[0].up, "weight") @ getattr(self, "proj", None).weight  # noqa: B009


class ByComputedString(Base):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("up", "down"):
            x = x @ getattr(self.blocks[0], name).weight
        return x


class Alias(Base):
    def forward(self, x: Tensor) -> Tensor:
        model = self
        return x @ model.proj.weight


class LocalName(Base):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.blocks[0].up
        return x @ layer.weight


class NameOfTwo(Base):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.proj if x.dim() > 2 else self.head
        x = x * layer.weight.mean()
        layer = self.blocks[0].up  # under the same name, but only called
        return layer(x)


class TwoNames(Base):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.proj, self.head
        return second(x * first.weight.mean())


class Unpacked(Base):
    def forward(self, x: Tensor) -> Tensor:
        first, *_ = reversed_blocks = self.blocks
        for block in reversed(reversed_blocks):
            x = x * block.down.weight.mean()
        return first(x)


class NamedInPassing(Base):
    def forward(self, x: Tensor) -> Tensor:
        head: nn.Linear = self.head
        if (layer := self.proj) is not None:
            x = x * layer.weight.mean()
        return x @ head.weight


class Lambda(Base):
    """x-transformers' tied heads."""

    def __init__(self) -> None:
        super().__init__()
        self.to_logits = lambda x: x @ self.proj.weight.t()


class InfiniteAttention(Base):
    def infinite(self, x: Tensor) -> Tensor:  # no constructor, though there is an "init" in its name
        return x @ self.proj.weight


class ByKey(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.experts["b"].weight


class PackedAttention(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.attention.in_proj_weight)


class RecurrentByHand(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.cell = nn.LSTM(4, 4), nn.GRU(4, 4, bidirectional=True), nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.lstm.weight_hh_l0[:4] @ self.gru.weight_ih_l0_reverse[:4] @ self.cell.weight_ih[:4]


class AttentionByHand(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.attention.out_proj.weight.T


class Property(Base):
    @property
    def size(self) -> Tensor:
        return self.proj.weight.norm()


class Reached(Base):
    """By methods that the forward mentions in all the ways that there are, and by what is called from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(self._hooked)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "_by_string")(self._first(x)) * self._of_a_property * self.given_a_name  # noqa: B009

    def _first(self, x: Tensor) -> Tensor:
        return self._second()

    def _second(self) -> Tensor:
        return self.proj.weight.square()

    def _by_string(self, x: Tensor) -> Tensor:
        return x @ self.head.weight

    @property
    def _of_a_property(self) -> Tensor:
        return self.blocks[0].up.weight.norm()

    def _get(self) -> Tensor:
        return self.blocks[1].up.weight.norm()

    given_a_name = property(_get)

    def _hooked(self, *args: Any) -> None:
        self.blocks[2].up.weight.div_(2)

    def generate(self, ids: Tensor | None = None) -> Tensor:
        return self._decoded()

    def _decoded(self) -> Tensor:
        return self.experts["a"].weight.square()


class HandsItToAMethod(Base):
    """As LayoutLMv3 does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.look_up(x, self.head, table=self.proj)

    def look_up(self, x: Tensor, called: nn.Linear, *, table: nn.Linear) -> Tensor:
        weight = table.weight
        return called(F.embedding(x, weight)) if x.dim() else self.look_up(x, called, table=table)


class ReadsAnArgument(Block):
    def forward(self, x: Tensor, table: nn.Linear | None = None) -> Tensor:
        return super().forward(x) if table is None else x @ table.weight


class HandsItOn(Base):
    """As DeBERTa does, whose head is handed the embedding by way of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.block = ReadsAnArgument()
        self.others = nn.ModuleList([ReadsAnArgument(), ReadsAnArgument()])

    def forward(self, x: Tensor) -> Tensor:
        for other in self.others:
            x = other(x, table=self.proj)
        return self.inner.block(x, self.blocks[1].up) + self.others[0](x) + self.blocks[0](x, self.head)


class Switched(Base):
    """Read in one configuration, called in the other."""

    def __init__(self, slices: int = 1, exact: bool = False) -> None:
        super().__init__()
        self.slices, self.exact = slices, exact

    def forward(self, x: Tensor) -> Tensor:
        if self.slices > 1 and self.exact:
            return F.linear(x, self.proj.weight[:, : self.slices])
        else:
            return self.proj(x)


class Inherits(MultipliesByIt):
    pass


READS: list[tuple[nn.Module, dict[str, str]]] = [
    (MultipliesByIt(), {"head": "MultipliesByIt.forward"}),
    (Deep(), {"blocks.1.up": "Deep.helper"}),
    (AnyIndex(), {f"blocks.{i}.up": "AnyIndex.forward" for i in range(3)}),
    (Loop(), {f"blocks.{i}.down": "Loop.forward" for i in range(3)}),
    (EnumeratedLoop(), {f"blocks.{i}.down": "EnumeratedLoop.forward" for i in range(3)}),
    (ZippedLoop(), {f"blocks.{i}.up": "ZippedLoop.forward" for i in range(3)}),
    (
        LoopOverWritten(),
        dict.fromkeys(("proj", "blocks.0.up", "experts.a", "experts.b", "head"), "LoopOverWritten.forward"),
    ),
    (
        LoopOverChildren(),
        dict.fromkeys(
            ("blocks.0.up", "blocks.1.up", "blocks.2.up", "blocks.0.down", "experts.a", "experts.b"),
            "LoopOverChildren.forward",
        ),
    ),
    (LoopOverAll(), dict.fromkeys(("experts.a", "experts.b"), "LoopOverAll.forward")),
    (ByString(), {"blocks.0.up": "ByString.forward", "proj": "ByString.forward"}),
    (ByComputedString(), dict.fromkeys(("blocks.0.up", "blocks.0.down"), "ByComputedString.forward")),
    (Alias(), {"proj": "Alias.forward"}),
    (LocalName(), {"blocks.0.up": "LocalName.forward"}),
    (NameOfTwo(), dict.fromkeys(("proj", "head", "blocks.0.up"), "NameOfTwo.forward")),
    (TwoNames(), {"proj": "TwoNames.forward"}),
    (Unpacked(), {f"blocks.{i}.down": "Unpacked.forward" for i in range(3)}),
    (NamedInPassing(), {"proj": "NamedInPassing.forward", "head": "NamedInPassing.forward"}),
    (InfiniteAttention(), {"proj": "InfiniteAttention.infinite"}),
    (InitialState(), {"proj": "InitialState.initial_state", "head": "InitialState.init_hidden"}),
    (AnotherNameForSelf(), {"proj": "AnotherNameForSelf.forward"}),
    (ByKey(), {"experts.b": "ByKey.forward"}),
    (PackedAttention(), {"attention": "PackedAttention.forward"}),
    (RecurrentByHand(), dict.fromkeys(("lstm", "gru", "cell"), "RecurrentByHand.forward")),
    (AttentionByHand(), {"attention.out_proj": "AttentionByHand.forward"}),
    (Property(), {"proj": "Property.size"}),
    (
        Reached(),
        {
            "proj": "Reached._second",
            "head": "Reached._by_string",
            "blocks.0.up": "Reached._of_a_property",
            "blocks.1.up": "Reached._get",
            "blocks.2.up": "Reached._hooked",
            "experts.a": "Reached._decoded",
        },
    ),
    (HandsItToAMethod(), {"proj": "HandsItToAMethod.look_up"}),
    (HandsItOn(), {"blocks.1.up": "ReadsAnArgument.forward", "proj": "ReadsAnArgument.forward"}),
    (Switched(slices=2, exact=True), {"proj": "Switched.forward"}),
    (Inherits(), {"head": "Inherits.forward"}),
    (Lambda(), {"proj": "Lambda.<lambda>"}),
]


@pytest.mark.parametrize(("model", "expected"), READS, ids=[type(model).__name__ for model, _ in READS])
def test_found(model: nn.Module, expected: dict[str, str]) -> None:
    assert weight_readers(model) == expected
    nested = nn.ModuleDict({"inner": model})
    assert weight_readers(nested) == {f"inner.{name}": method for name, method in expected.items()}


# -- ways to ask for a dtype -------------------------------------------------------------------------------------------


class AsksItsDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype))


class AsksIfTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.blocks[0].up.weight.dtype) if self.training else x)


class AsksInAProperty(Base):
    """As OpenAI's CLIP does."""

    @property
    def dtype(self) -> torch.dtype:
        return self.proj.weight.dtype

    @functools.cached_property
    def first(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.proj(x.to(self.dtype)).to(self.first))


class AsksALstm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.to(self.lstm.weight_ih_l0.dtype))[0]


class AsksInAFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        def cast(y: Tensor) -> Tensor:
            return y.to(self.proj.weight.dtype)

        return self.proj(cast(x))


class HandsItToBoth(Base):
    """To a method that asks for the dtype, and to one that also reads the weight."""

    def cast(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return x.to(layer.weight.dtype)

    def multiply(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return x.to(layer.weight.dtype) @ layer.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.cast(x, self.proj), self.head)


class AsksForShapes(nn.Module):
    """Of layers whose codes are laid out otherwise than their weights, and of others."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.up, self.proj = Conv1D(6, 4), nn.ConvTranspose1d(4, 6, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.turned(x * self.proj.weight.shape[0]) * self.turned.weight.shape[0] ** -0.5
        return self.up(x[:, :4, None]) * self.up.weight.size(1)


ASKS: list[tuple[nn.Module, set[str], dict[str, str]]] = [
    (AsksItsDtype(), {"proj"}, {}),
    (AsksIfTraining(), {"blocks.0.up"}, {}),
    (AsksInAProperty(), {"proj", "head"}, {}),
    (AsksInAFunction(), {"proj"}, {}),
    (AsksALstm(), {"lstm"}, {}),
    (HandsItToBoth(), {"proj", "head"}, {"head": "HandsItToBoth.multiply"}),
    (AsksForShapes(), {"turned", "up"}, {}),
    (MultipliesByIt(), set(), {"head": "MultipliesByIt.forward"}),
]


@pytest.mark.parametrize(("model", "asked", "read"), ASKS, ids=[type(model).__name__ for model, *_ in ASKS])
def test_asked_about(model: nn.Module, asked: set[str], read: dict[str, str]) -> None:
    assert weight_readers(model) == read
    assert {name for name in asked_for_dtype_or_shape(model) if name not in read} == asked - read.keys()


# -- ways to multiply --------------------------------------------------------------------------------------------------


class Multiplies(Base):
    """In all the ways in which codes can be used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv1d(4, 4, 1), nn.Embedding(12, 4)

    def by_name(self, x: Tensor) -> Tensor:
        return nn.functional.linear(input=x, weight=self.proj.weight, bias=None)

    def in_a_loop(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.nn.functional.linear(x.to(block.up.weight.dtype), block.up.weight) * block.up.weight.shape[0]
        return x

    def in_a_function(self, x: Tensor) -> Tensor:
        return projected(x, self.attention.out_proj.weight, self.blocks[0].down.weight, scale=2)

    def by_a_function_given_it_by_name(self, x: Tensor) -> Tensor:
        return projected(x, second=self.blocks[1].down.weight, first=self.experts.a.weight)

    def handed_to_a_method(self, x: Tensor, layer: nn.Module) -> Tensor:
        return F.conv1d(x, layer.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_a_function(self.in_a_loop(self.by_name(x)))
        return F.linear(self.handed_to_a_method(x.T, self.conv).T, self.table.weight)


def projected(x: Tensor, first: Tensor, second: Tensor, scale: float = 1) -> Tensor:
    """What it is handed goes into products, here and further down."""
    x = x.reshape(-1, first.shape[-1]).to(first.dtype)
    return scale * once_more(F.linear(x, first), second)


def once_more(x: Tensor, weight: Tensor) -> Tensor:
    assert weight is not None
    return F.linear(x, weight, None)


class MultipliesOtherwise(Base):
    """In ways in which codes would do something else."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = Conv1D(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.mul
        x = linear(x, self.proj.weight) + F.linear(self.head.weight, x)
        x = F.linear(x, self.turned.weight)
        x = normalized(x, self.experts.a.weight) + overwritten(x, self.experts.b.weight)
        x = in_parts(x, self.blocks[0].down.weight) + doubled(x, weight=self.blocks[1].down.weight)
        x = F.linear(*(x, self.blocks[2].up.weight)) + F.linear(*[x], self.blocks[2].down.weight)
        return F.linear(F.linear(x, self.blocks[0].up.weight.T), self.blocks[1].up.weight * 2)


linear = F.linear


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) / weight.norm()


def overwritten(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight / 2
    return F.linear(x, weight)


def in_parts(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if len(x) < 9 else torch.cat([in_parts(part, weight) for part in x.chunk(2)])


def twice_the_weight(function: Any) -> Any:
    @functools.wraps(function)
    def call(x: Tensor, weight: Tensor) -> Tensor:
        return function(x, 2 * weight)

    return call


@twice_the_weight
def doubled(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def test_multiplied() -> None:
    model = Multiplies()
    assert weight_readers(model) == {}
    assert used_in_products(model) == {
        "proj", "blocks.0.up", "blocks.1.up", "blocks.2.up", "attention.out_proj", "blocks.0.down", "blocks.1.down",
        "experts.a", "conv", "table",
    }  # fmt: skip


def test_multiplied_otherwise() -> None:
    model = MultipliesOtherwise()
    read = {"proj", "head", "turned", "experts.a", "experts.b"}
    read |= {f"blocks.{i}.{layer}" for i in range(3) for layer in ("up", "down")}
    assert weight_readers(model) == dict.fromkeys(read, "MultipliesOtherwise.forward")
    assert used_in_products(model) == set()


# -- ways to test a class ----------------------------------------------------------------------------------------------


class SortsItsParts(Base):
    """In all the ways that there are, of layers that can be told."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x) if isinstance(block.up, (nn.Linear, nn.Conv1d)) else x
        if type(self.proj) is nn.Linear and type(self.attention) in (nn.MultiheadAttention, nn.Identity):
            x = self.proj(x)
        if self.head.__class__.__name__ == "Linear" and not isinstance(self.blocks[2].down, nn.Conv2d):
            x = self.head(x)
        return x if isinstance(x, Tensor) and isinstance(self.experts, nn.ModuleDict) else x[0]


class SortsWhatItIsHanded(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.proj)

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x) if isinstance(layer, nn.Linear) else x


class SortsUnknowns(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self._chosen():
            x = layer(x) if isinstance(layer, nn.Linear) else x
        return self.blocks[0](x)

    def _chosen(self) -> list[nn.Module]:
        return [self.proj]


class SortsToSetUp(Base):
    """As transformers' models do, and what becomes of a model that is fused."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def fuse(self) -> int:
        return sum(isinstance(module, nn.Linear) for module in self.modules())


HELD = ("proj", "head", "experts.a", "experts.b")
TESTS: list[tuple[nn.Module, dict[str, str]]] = [
    (
        SortsItsParts(),
        dict.fromkeys(
            ("blocks.0.up", "blocks.1.up", "blocks.2.up", "proj", "head", "attention", "experts"),
            "SortsItsParts.forward",
        ),
    ),
    (SortsWhatItIsHanded(), dict.fromkeys(HELD, "SortsWhatItIsHanded.run")),
    (SortsUnknowns(), dict.fromkeys(HELD, "SortsUnknowns.forward")),
    (SortsToSetUp(), {}),
    (MultipliesByIt(), {}),
]


@pytest.mark.parametrize(("model", "expected"), TESTS, ids=[type(model).__name__ for model, _ in TESTS])
def test_told_apart(model: nn.Module, expected: dict[str, str]) -> None:
    assert class_testers(model) == expected
    assert class_testers(nn.Sequential(model)) == {f"0.{name}": method for name, method in expected.items()}


@pytest.mark.parametrize("cls", [SortsItsParts, SortsWhatItIsHanded, SortsUnknowns])
def test_a_model_that_tests_classes_computes_what_it_did(cls: type[Base]) -> None:
    model, x = cls().eval(), torch.randn(3, 4)
    expected = model(x)
    with pytest.warns(OctavoWarning, match=rf"{cls.__name__}\.\w+ tests its class, which would be another"):
        report = octavo.quantize(model, "w8a16")
    assert 0 < report.quantized_fraction < 1
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


class SortsNorms(nn.Module):
    """Of layers that stay float, whose places others would take that compute the same faster."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.proj = nn.RMSNorm(512), nn.Linear(512, 512), nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) if isinstance(self.norm, nn.RMSNorm) else x
        return self.proj(self.wide(x) if type(self.wide) is nn.Linear else x)


def test_what_is_tested_is_replaced_by_nothing() -> None:
    model, x = SortsNorms().eval(), torch.randn(3, 512)
    expected = model(x)
    with pytest.warns(OctavoWarning, match="tests its class"):
        octavo.quantize(model, "w8a16")
    assert type(model.norm) is nn.RMSNorm and type(model.wide) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


class ReadsItself(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class AsksItself(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def test_a_layer_reads_itself() -> None:
    model = nn.ModuleDict({"a": ReadsItself(4, 4), "b": AsksItself(4, 4), "c": nn.Linear(4, 4), "d": nn.LayerNorm(4)})
    assert weight_readers(model) == {"a": "ReadsItself.forward"} and asked_for_dtype_or_shape(model) == {"b"}


# -- ways that do no harm ---------------------------------------------------------------------------------------------


class OnlyCalls(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.proj(x))


class AsksWhereItIs(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.proj.weight.device)
        assert x.shape[-1] == self.proj.weight.shape[1]
        return self.proj(x)


class MindsInt8(Base):
    """As T5 does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.proj.weight.dtype and self.proj.weight.dtype != torch.int8:
            x = x.to(self.proj.weight.dtype)
        return self.proj(x)


class SetsUp(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.proj.weight

    def _init_weights(self) -> None:
        nn.init.zeros_(self.proj.weight)

    def resize_token_embeddings(self, n: int) -> Tensor:
        return self.proj.weight[:n]

    def load_from(self, weights: dict[str, Tensor]) -> None:  # MONAI's Swin UNETR
        self.proj.weight.copy_(weights["proj"])

    def __prepare_scriptable__(self) -> nn.Module:  # torchaudio's wav2vec 2.0
        return self.head if self.proj.__class__.__name__ == "Linear" else self


class Converted(Base):
    """By methods that are called once, when the model was made or is to be another: timm's, diffusers'."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = False
        self.fix_init_weight()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if self.fused else self.head(self.proj(x))

    def fix_init_weight(self) -> None:
        for block in self.blocks:
            block.down.weight.data.div_(2)

    def fuse(self) -> Tensor:
        return self._product(self.proj)

    def fuse_projections(self, fuse: bool = True) -> None:
        self.qk = torch.cat([self.proj.weight, self.head.weight])
        self.fused = fuse

    def _product(self, layer: nn.Linear) -> Tensor:
        return self.head.weight @ layer.weight


class ClippedByATrainer(Base):
    """x-transformers' attention."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def clip_(self, most: float) -> None:
        self.proj.weight.data.clamp_(-most, most)


class OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class WhenTraining(Base):
    """As Mamba 2 does."""

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        if self.training and cache is None:
            return x.to(self.proj.weight.dtype) @ self.proj.weight.T
        return self.proj(x)


@pytest.mark.parametrize(
    "model",
    [
        OnlyCalls(),
        WhenTraining(),
        AsksWhereItIs(),
        MindsInt8(),
        SetsUp(),
        Converted(),
        ClippedByATrainer(),
        OwnWeight(),
        Switched(),
        Switched(slices=2),
        Switched(exact=True),
        nn.TransformerEncoderLayer(4, 2, 8),
    ],
    ids=lambda model: type(model).__name__,
)
def test_spared(model: nn.Module) -> None:
    assert weight_readers(model) == class_testers(model) == {}


def test_a_layer_in_two_places_is_found_by_its_first_name() -> None:
    """T5's decoder reads `self.embed_tokens`, which the model calls `shared`."""
    inner = MultipliesByIt()
    model = nn.ModuleDict({"shared": inner.head, "decoder": inner})
    assert weight_readers(model) == {"shared": "MultipliesByIt.forward"}


CELL = "class Typed(Base):\n    def forward(self, x):\n        return x @ self.proj.weight\n"


def typed(file: str) -> nn.Module:
    """An instance of the class in `CELL`, as an interactive interpreter makes it: in a module without a file."""
    module = types.ModuleType("typed")
    module.Base = Base
    sys.modules["typed"] = module
    try:
        exec(compile(CELL, file, "exec"), vars(module))
        return module.Typed()
    finally:
        del sys.modules["typed"]


def test_a_class_in_a_cell_of_a_notebook_is_read() -> None:
    linecache.cache["<cell 1>"] = (len(CELL), None, CELL.splitlines(True), "<cell 1>")  # as IPython does
    assert weight_readers(typed("<cell 1>")) == {"proj": "Typed.forward"}


def test_a_class_without_a_source_is_named() -> None:
    with pytest.warns(OctavoWarning, match="the source of Typed cannot be read"):
        assert weight_readers(typed("<stdin>")) == {}
    with pytest.warns(OctavoWarning, match="the source of Typed cannot be read"):
        assert octavo.quantize(typed("<stdin>"), "w8a16").quantized_fraction > 0.5


def test_a_setting_is_looked_up_in_a_configuration_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=16, hidden_size=8, n_layer=2, n_head=2)
    assert weight_readers(transformers.BloomModel(config)) == {}
    slow = transformers.BloomConfig(
        vocab_size=16, hidden_size=8, n_layer=2, n_head=2, pretraining_tp=2, slow_but_exact=True
    )
    assert weight_readers(transformers.BloomModel(slow)) == {
        f"h.{i}.{layer}": f"{method}.forward"
        for i in range(2)
        for layer, method in (("self_attention.dense", "BloomAttention"), ("mlp.dense_4h_to_h", "BloomMLP"))
    }


class WithABiasOfItsOwn(nn.Module):
    """BEiT's attention."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8, bias=False)
        self.register_parameter("q_bias", nn.Parameter(torch.zeros(8)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        return x @ self.qkv.weight.T + self.q_bias


class UnlessItRotates(nn.Module):
    """ESM-2's attention: fairseq's, which torch's function computes if nothing else does."""

    def __init__(self, rotation: nn.Module | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8)
        self.rotation = nn.Identity()  # None is a child then
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        if not self.rotation and x is not None:
            return x @ self.qkv.weight.T
        return self.qkv(x)


def test_what_a_module_lacks_is_a_setting() -> None:
    assert weight_readers(WithABiasOfItsOwn(bias=False)) == {}
    assert weight_readers(WithABiasOfItsOwn(bias=True)) == {"qkv": "WithABiasOfItsOwn.forward"}
    assert weight_readers(UnlessItRotates(nn.Identity())) == {}
    for nothing in (None, nn.ModuleList()):
        assert weight_readers(UnlessItRotates(nothing)) == {"qkv": "UnlessItRotates.forward"}


def test_what_reads_weights_while_training_refuses_to_be_trained(tmp_path: Path) -> None:
    """Of itself it would take codes for weights: no error, and nonsense."""
    net, inputs = nn.ModuleDict({"inner": WhenTraining()}).eval(), torch.randn(3, 4)
    expected = net.inner(inputs)
    assert "inner.proj.weight" in {row.name for row in octavo.quantize(net, "w8a16").rows if row.scheme}
    octavo.save(net, tmp_path / "out")
    loaded = octavo.load(tmp_path / "out", model=nn.ModuleDict({"inner": WhenTraining()})).eval()
    for int8 in (net, loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(int8.inner(inputs), expected, rtol=0.05, atol=0.05)
        compiled = torch.compile(int8.inner, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(inputs), int8.inner(inputs))
        int8.train()
        message = r"inner\.proj: WhenTraining\.forward reads its weight directly while training.*ignore=\['inner\.proj'"
        with pytest.raises(octavo.OctavoError, match=message):
            int8.inner(inputs)
        torch.testing.assert_close(int8.eval().inner(inputs), expected, rtol=0.05, atol=0.05)
    spared = nn.ModuleDict({"inner": WhenTraining()})
    octavo.quantize(spared, "w8a16", ignore=["inner.proj"])
    assert spared.train().inner(inputs).shape == (3, 4)


class MultipliesWhenTraining(nn.Module):
    """By codes that its product can use, or by those of a layer whose weight lies turned around."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.layer: nn.Module = Conv1D(4, 4) if turned else nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.linear(x, self.layer.weight)  # type: ignore[arg-type]
        return self.layer(x)  # type: ignore[no-any-return]


def test_products_while_training_are_refused_where_codes_cannot_be_used() -> None:
    inputs = torch.randn(3, 4)
    fits, turned = MultipliesWhenTraining(turned=False), MultipliesWhenTraining(turned=True)
    for model in (fits, turned):
        octavo.quantize(model, "w8a16")
    torch.testing.assert_close(fits.train()(inputs), fits.eval()(inputs))
    with pytest.raises(octavo.OctavoError, match=r"layer: MultipliesWhenTraining\.forward reads its weight directly"):
        turned.train()(inputs)


def test_mamba_2_hands_its_output_projection_to_a_kernel_while_training() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    model = transformers.Mamba2Model(config).eval()
    ids = torch.randint(0, 16, (2, 5))
    expected = model(ids).last_hidden_state
    report = octavo.quantize(model, "w8a16")
    assert {row.name for row in report.rows if row.scheme} == {
        "layers.0.mixer.in_proj.weight", "layers.0.mixer.out_proj.weight",
    }  # fmt: skip
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=0.05, atol=0.05)
    with pytest.raises(octavo.OctavoError, match=r"layers\.0\.mixer\.out_proj: Mamba2Mixer\.\w+ reads"):
        model.train()(ids)


def test_rwkv_rescales_its_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2)
    assert set(weight_readers(transformers.RwkvModel(config))) == {
        f"blocks.{i}.{layer}" for i in range(2) for layer in ("attention.output", "feed_forward.value")
    }


def test_layers_that_are_handed_to_a_method_in_real_models() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LayoutLMv3Config(**small, coordinate_size=1, shape_size=2, visual_embed=False)
    layout = weight_readers(transformers.LayoutLMv3Model(config))
    assert {name.rpartition(".")[2] for name in layout} == {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"}
    deberta = transformers.DebertaForMaskedLM(transformers.DebertaConfig(**small, legacy=False))
    assert "deberta.embeddings.word_embeddings" in weight_readers(deberta)


COMMON = ["Llama", "Qwen2", "Mistral", "GPT2", "Bert", "T5", "Phi3", "GPTNeoX", "Falcon", "Gemma3Text"]


@pytest.mark.parametrize("name", COMMON)
def test_common_models_have_no_readers(name: str) -> None:
    """Found where there are none, the model would stay float."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")()
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert weight_readers(model) == {}
