"""Experts of classes that nobody told of are found by what they do; what does anything else is left alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo.errors import OctavoWarning
from octavo.experts import spec_of
from octavo.modules import QuantExperts
from octavo.primitives import dequantize
from tests.nearness import relative_error

E, H, I = 5, 32, 24  # noqa: E741 -- the sizes' names


def stack(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


# -- experts -----------------------------------------------------------------------------------------------------------


class Three(nn.Module):
    """Mixtral's formula with three stacks, as it is often written: expert by expert, also those without tokens."""

    def __init__(self, width: int = I) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = stack(E, width, H), stack(E, H, width), stack(E, width, H)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(len(self.w1)):
            token, place = torch.where(chosen == e)
            rows = x[token]
            h = F.linear(F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e]), self.w2[e])
            y.index_add_(0, token, weights[token, place, None] * h)
        return y


class Square(Three):
    """The shapes do not tell which axis is which."""

    def __init__(self) -> None:
        super().__init__(H)


class Fused(nn.Module):
    """Gate and up in one, the gate second; an activation that it holds; input channels first."""

    def __init__(self, width: int = I) -> None:
        super().__init__()
        self.up_and_gate, self.down = stack(E, H, 2 * width), stack(E, width, H)
        self.act = nn.GELU("tanh")
        self.sizes = [H, width]

    def expert(self, e: int, x: Tensor) -> Tensor:
        up, gate = (x @ self.up_and_gate[e]).chunk(2, -1)
        return torch.matmul(self.act(gate) * up, self.down[e])

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, place = torch.where(index == e)
            y = y.index_add(0, token, weights[token, place].unsqueeze(1) * self.expert(e, x[token]))
        return y


class Narrow(Three):
    def __init__(self) -> None:
        super().__init__(1)


class FusedNarrow(Fused):
    def __init__(self) -> None:
        super().__init__(1)


class FusedSquare(Fused):
    def __init__(self) -> None:
        super().__init__(H)


class Dense(nn.Module):
    """All experts on all tokens, most of them weighted by 0. No gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = stack(E, I, H), stack(E, H, I)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        share = torch.zeros(len(x), E, dtype=x.dtype).scatter_add(1, index, weights)
        outs = [F.relu(x.mm(self.inner[e].t())).matmul(self.outer[e].transpose(0, 1)) for e in range(E)]
        return sum(share[:, e, None] * out for e, out in enumerate(outs))  # type: ignore[return-value]


class Loop(nn.Module):
    """One expert after another; each class has an `expert` of its own."""

    expert: Any

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, place = torch.where(chosen == e)
            y.index_add_(0, token, weights[token, place, None] * self.expert(e, x[token]))
        return y


class Turned(Loop):
    """All weights [E, I, H], as megablocks has them: input channels come first in the last one only."""

    def __init__(self, width: int = I) -> None:
        super().__init__()
        self.w1, self.w2 = stack(E, width, H), stack(E, width, H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.gelu(x @ self.w1[e].T) @ self.w2[e]


class TurnedSquare(Turned):
    def __init__(self) -> None:
        super().__init__(H)


class Flat(Turned):
    """The same in two dimensions; E is told by nothing but the parts that are multiplied by."""

    def __init__(self, width: int = I) -> None:
        super().__init__()
        self.w1, self.w2 = stack(E * width, H), stack(E * width, H)
        self.width = width

    def expert(self, e: int, x: Tensor) -> Tensor:
        rows = slice(e * self.width, (e + 1) * self.width)
        return F.gelu(F.linear(x, self.w1[rows])) @ self.w2[rows]


class FlatNarrow(Flat):
    def __init__(self) -> None:
        super().__init__(1)


class FlatPlain(Flat):
    """Output channels first in both, which differ in both sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = stack(E * H, I)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.w1.view(E, I, H)[e])) @ self.w2.unflatten(0, (E, H))[e].T


class Holder(nn.Module):
    """Holds the weights for the layer around it, with an activation that neither torch nor that one has."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = stack(E * 2 * I, H), stack(E * I, H), nn.LeakyReLU(0.3)

    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ up.T).chunk(2, -1)
        return (self.act(gate) * up) @ down


class Around(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Holder()

    def expert(self, e: int, x: Tensor) -> Tensor:
        up, down = self.inner.up.view(-1, 2 * I, H)[e], self.inner.down.view(-1, I, H)[e]
        return self.inner(x, up, down)  # type: ignore[no-any-return]


@torch.no_grad()
def dequantized(layer: nn.Module, codes: QuantExperts) -> nn.Module:
    layer = copy.deepcopy(layer).double()
    for name, (code, scale) in codes.codes().items():
        weight = torch.stack([dequantize(c, s) for c, s in zip(code, scale, strict=True)])
        layer.get_parameter(name).copy_(codes.spec.held(name, weight))
    return layer


def int8(layer: nn.Module, scheme: str = "w8a16") -> QuantExperts:
    holder = nn.Sequential(copy.deepcopy(layer))
    report = octavo.quantize(holder, scheme)
    assert report.quantized_fraction == 1 and {row.kind for row in report.rows} == {"Experts"}
    assert isinstance(holder[0], QuantExperts)
    return holder[0]


EXPERTS = [
    Three, Square, Narrow, Fused, FusedSquare, FusedNarrow, Dense,
    Turned, TurnedSquare, Flat, FlatNarrow, FlatPlain, Around,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("make", EXPERTS)
def test_experts_are_found_and_computed(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = make().eval()
    weights, activations = int8(layer), int8(layer, "w8a8")
    truth = dequantized(layer, weights)
    for tokens, top_k in ((1, 1), (7, 2), (3, E)):
        x, index = torch.randn(tokens, H), torch.rand(tokens, E).argsort(-1)[:, :top_k]
        share = torch.rand(tokens, top_k)
        y = weights(x, index, share)
        assert relative_error(y, truth(x.double(), index, share.double())) < 1e-5
        assert relative_error(activations(x, index, share), layer(x, index, share)) < 0.03
        assert torch.equal(pickle.loads(pickle.dumps(weights))(x, index, share), y)
    assert weights(torch.randn(0, H), torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2)).shape == (0, H)


def test_sizes_of_real_models_take_no_memory() -> None:
    class Large(Three):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            for name, shape in {"w1": (512, 4096, 6144), "w3": (512, 4096, 6144), "w2": (512, 6144, 4096)}.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))

    spec = spec_of(Large())
    assert spec is not None and (spec.up, spec.down, spec.transposed) == (("w1", "w3"), "w2", ())


@pytest.mark.parametrize("around", [torch.device("meta"), torch.inference_mode()])
def test_they_are_found_whatever_the_defaults_are(around: Any) -> None:
    class Mine(Dense):
        pass

    with around:
        assert spec_of(Mine()) is not None


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = stack(E, H, I)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([rows @ self.kernels[e] for e, rows in enumerate(x.split(sizes))])


@torch.no_grad()
def test_linear_layers_for_rows_that_are_sorted_by_expert() -> None:
    layer = Split()
    weights, activations = int8(layer), int8(layer, "w8a8")
    sizes = [2, 0, 3, 1, 0]
    x = torch.randn(6, H)
    assert relative_error(weights(x, sizes), dequantized(layer, weights)(x.double(), sizes)) < 1e-5
    assert relative_error(activations(x, sizes), layer(x, sizes)) < 0.03


# -- what is none ------------------------------------------------------------------------------------------------------


class Doubled(Three):
    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, chosen, weights) * 2


class Wide(Three):
    """In bf16 too."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, chosen, weights).float()


class Counting(Three):
    calls = 0

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, chosen, weights)


class InPlace(Three):
    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = super().forward(x, chosen, weights)
        x.zero_()
        return y


class Training(Three):
    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, chosen, weights) * (0.9 if self.training else 1)


class Optional(Three):
    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
        return super().forward(x, chosen, torch.ones(chosen.shape, dtype=x.dtype) if weights is None else weights)


class Modulo(Three):
    """An index too large starts again."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, chosen % E, weights)


class Formula(Loop):
    """One expert's formula, in the place of which each class has another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = stack(E, 2 * H, H), stack(E, H, H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[e])


class Reversed(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(E - 1 - e, x)


class Clamped(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.up[e]).clamp(max=100).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[e])


class Interleaved(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        h = F.linear(x, self.up[e])
        return F.linear(F.silu(h[..., ::2]) * h[..., 1::2], self.down[e])


class Twice(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.linear(super().expert(e, x), self.down[e])


class Cut(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.up[e]).chunk(2, -1)
        return F.pad(F.linear(F.silu(gate) * up, self.down[e][: H // 2]), (0, H // 2))


class Normed(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x) / self.down[e].norm()


class Biased(Formula):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(E, H))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x) + self.bias[e]


class Mixed(Formula):
    """Tokens of one expert see each other."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x - x.mean(0))


class Shifted(Formula):
    """Its experts do not begin where those of the parameter do."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.up[e]).chunk(2, -1)
        first = min(e * H + 1, (E - 1) * H)
        return F.linear(F.silu(gate) * up, self.down.flatten(0, 1)[first : first + H])


class Viewed(Formula):
    """Its output channels are not those of the parameter."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = (x @ self.up.view(E, H, 2 * H)[e]).chunk(2, -1)
        return (F.silu(gate) * up) @ self.down[e]


class Constant(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[e], torch.ones(H, dtype=x.dtype))


class Batched(Formula):
    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = torch.bmm(x.unsqueeze(0), self.up[e : e + 1].mT)[0].chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[e])


class Idle(Formula):
    """Another method may use what it holds besides."""

    def __init__(self) -> None:
        super().__init__()
        self.other = stack(E, H, H)


class Buffered(Formula):
    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x) * getattr(self, "factor", 1)


class Followed(Formula):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Sequential(nn.Tanh())

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.after(super().expert(e, x))  # type: ignore[no-any-return]


class FlatWithMore(Flat):
    """Rows of no expert."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = stack(E * I + 1, H), stack(E * I + 1, H)


class FlatInTurn(Flat):
    """Each expert has every E-th row."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.w1[e::E])) @ self.w2[e::E]


class FlatColumns(Flat):
    """Each expert has columns."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = stack(I, E * H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, self.w1[e * I : (e + 1) * I])) @ self.w2[:, e * H : (e + 1) * H]


class FlatOverlapping(Flat):
    """Of as many experts as it has weights, each begins within the one before."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        rows = slice(e * I // 2, e * I // 2 + I)
        return F.gelu(F.linear(x, self.w1[rows])) @ self.w2[rows]


class AroundAndMore(Around):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(H, 1))


class AroundHooked(Around):
    """Int8 experts would not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.register_forward_hook(lambda module, args, y: 2 * y)


class AroundCounting(Around):
    """The child changes."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.inner.calls = getattr(self.inner, "calls", 0) + 1
        return super().forward(x, index, weights)


@pytest.mark.parametrize(
    "make",
    [FlatWithMore, FlatInTurn, FlatColumns, FlatOverlapping, AroundAndMore, AroundHooked, AroundCounting],
)
def test_2d_weights_of_anything_else_stay_float_and_are_listed(make: type[nn.Module]) -> None:
    layer = make()
    with pytest.warns(OctavoWarning, match="is not a layer kind that octavo knows"):
        report = octavo.quantize(nn.Sequential(layer), "w8a16")
    assert report.quantized_fraction == 0 and report.unasked_fraction > 0.9
    assert all(spec_of(each()) is not None for each in (Flat, Around))


def test_what_only_calls_experts_is_none() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Three()

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return self.experts(x, index, weights)  # type: ignore[no-any-return]

    model = nn.Sequential(Caller())
    assert spec_of(model[0]) is None
    octavo.quantize(model, "w8a16")
    assert isinstance(model[0], Caller) and isinstance(model[0].experts, QuantExperts)


def test_2d_experts_that_stay_float_have_the_reason() -> None:
    model = nn.Sequential(Around())
    rows = octavo.coverage(model).rows
    assert {row.reason for row in rows} == {"not quantized"}
    rows = octavo.quantize(model, "w8a16", ignore=["Experts"], include=[]).rows
    assert {row.reason for row in rows} == {"ignored by 'Experts'"} and all(row.asked for row in rows)


def test_2d_experts_that_share_weights_stay_float() -> None:
    model = nn.ModuleList([Around(), Around()])
    model[1].inner.up = model[0].inner.up
    with pytest.warns(OctavoWarning, match="shares its weight with"):
        octavo.quantize(model, "w8a16")
    assert not any(isinstance(module, QuantExperts) for module in model.modules())


class IdleSplit(Split):
    def __init__(self) -> None:
        super().__init__()
        self.other = stack(E, H, H)


class NoProduct(Split):
    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return x


class SomeTurned(Split):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = stack(E, H, H)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        turned = [w.T if e % 2 else w for e, w in enumerate(self.kernels)]
        return torch.cat([rows @ turned[e] for e, rows in enumerate(x.split(sizes))])


class Other(Split):
    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return torch.cat([rows @ self.kernels[E - 1 - e] for e, rows in enumerate(x.split(sizes))])


class HalfSplit(Split):
    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        return super().forward(x, sizes) / 2


@pytest.mark.parametrize(
    "make",
    [Doubled, Wide, Counting, InPlace, Training, Optional, Modulo, Reversed, Clamped, Interleaved, Twice, Cut, Normed,
     Biased, Mixed, HalfSplit, Shifted, Viewed, Constant, Batched, Idle, Buffered, Followed,
     IdleSplit, NoProduct, SomeTurned, Other],
)  # fmt: skip
def test_what_does_anything_else_stays_float_and_is_listed(make: type[nn.Module]) -> None:
    layer = make()
    with pytest.warns(OctavoWarning, match=f"3-D parameter of {make.__name__}"):
        report = octavo.quantize(nn.Sequential(layer), "w8a16")
    assert report.quantized_fraction == 0 and not any(row.asked for row in report.rows if len(row.shape) == 3)
    assert all(spec_of(each()) is not None for each in (Formula, Three, Split))


def test_only_layers_of_3d_weights_are_run() -> None:
    class Recorded(nn.Module):
        runs = 0

        def __init__(self) -> None:
            super().__init__()
            self.table, self.weight = nn.Parameter(torch.zeros(4, 4)), stack(E, H, I)

        def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
            type(self).runs += 1
            return x

    assert spec_of(Recorded()) is None and Recorded.runs == 0
