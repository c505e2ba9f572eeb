"""Layers that are fed one tensor quantize it once: counted, not assumed."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import octavo
from octavo import ops
from octavo.modules.shared_input import SharedInput

ONE, OTHER = object(), object()
"""Layers, as far as anyone asks."""


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return ops.quantize_per_token(x)


def test_the_same_tensor_is_quantized_once() -> None:
    shared, quantize, x = SharedInput(), Counted(), torch.randn(3, 4)
    first = shared.quantized(x, lambda: "k", ONE, quantize)
    assert shared.quantized(x, lambda: "k", OTHER, quantize) is first
    assert quantize.calls == 1
    assert torch.equal(first[0], ops.quantize_per_token(x)[0])


def test_another_key_tensor_or_version_is_quantized_anew() -> None:
    shared, quantize, x = SharedInput(), Counted(), torch.randn(3, 4)
    shared.quantized(x, lambda: "k", ONE, quantize)
    shared.quantized(x, lambda: "other", ONE, quantize)
    shared.quantized(x.clone(), lambda: "other", ONE, quantize)
    assert quantize.calls == 3
    shared.quantized(x, lambda: "k", OTHER, quantize)
    x.mul_(3)  # in place: the same object, another content
    _, scale = shared.quantized(x, lambda: "k", ONE, quantize)
    assert quantize.calls == 5
    assert torch.equal(scale, ops.quantize_per_token(x)[1])


class OnCuda(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_another_stream_is_quantized_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not wait for the codes; and the first finds its own no more, for one set is kept."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    current = [7]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: current[0], raising=False)
    shared, quantize, x = SharedInput(), Counted(), torch.randn(3, 4).as_subclass(OnCuda)
    first = shared.quantized(x, lambda: "k", ONE, quantize)
    current[0] = 8
    other = shared.quantized(x, lambda: "k", OTHER, quantize)
    assert other is not first and quantize.calls == 2
    assert shared.quantized(x, lambda: "k", ONE, quantize) is other
    current[0] = 7
    shared.quantized(x, lambda: "k", OTHER, quantize)
    assert quantize.calls == 3


@pytest.mark.gpu
def test_streams_of_a_gpu_share_nothing() -> None:
    shared, quantize, x = SharedInput(), Counted(), torch.randn(3, 4, device="cuda")
    shared.quantized(x, lambda: "k", ONE, quantize)
    with torch.cuda.stream(torch.cuda.Stream()):
        shared.quantized(x, lambda: "k", OTHER, quantize)
        shared.quantized(x, lambda: "k", ONE, quantize)
    assert quantize.calls == 2
    torch.cuda.synchronize()


def test_codes_die_with_their_tensor() -> None:
    shared, x = SharedInput(), torch.randn(3, 4)
    shared.quantized(x, lambda: "k", ONE, Counted())
    assert shared._last is not None
    del x
    gc.collect()
    assert shared._last is None


def test_nothing_is_shared_where_versions_are_not_counted() -> None:
    shared, quantize = SharedInput(), Counted()
    with torch.inference_mode():
        x = torch.randn(3, 4)
        for _ in range(2):
            shared.quantized(x, lambda: "k", ONE, quantize)
    assert quantize.calls == 2


def test_a_layer_is_never_served_the_same_codes_twice() -> None:
    shared, quantize, x = SharedInput(), Counted(), torch.randn(3, 4)
    for calls in (1, 2):
        for layer in (ONE, OTHER):
            shared.quantized(x, lambda: "k", layer, quantize)
        assert quantize.calls == calls


def test_nor_is_one_that_did_not_quantize_them() -> None:
    """As where the first of the layers is not called again."""
    shared, quantize, x = SharedInput(), Counted(), torch.randn(3, 4)
    for layer in (ONE, OTHER, OTHER):
        codes = shared.quantized(x, lambda: "k", layer, quantize)
    assert quantize.calls == 2
    assert shared.quantized(x, lambda: "k", ONE, quantize) is codes


@pytest.mark.parametrize("scheme", ["w8a8", "o2", "w8a8-static"])
def test_a_buffer_that_is_filled_behind_torchs_back(scheme: str) -> None:
    """As streaming code does: a tensor over numpy's memory, whose version does not count what numpy writes."""
    torch.manual_seed(0)
    model, buffer = Block(), np.zeros((5, 8), np.float32)
    octavo.quantize(model, scheme, stats=octavo.calibrate(model, [torch.randn(50, 8)]), repair=False)
    x = torch.from_numpy(buffer)
    with torch.no_grad():
        for _ in range(3):
            buffer[:] = np.random.default_rng(0).normal(size=(5, 8))
            assert torch.equal(model(x), model(x.clone()))
            x.data = torch.randn(3, 8)
            assert torch.equal(model(x), model(x.clone()))
            x.data = torch.from_numpy(buffer)


def test_a_trace_follows_its_input() -> None:
    """Though the model has seen the very tensor that it is traced on."""
    torch.manual_seed(0)
    model, x, other = Block(), torch.randn(5, 8), torch.randn(5, 8)
    octavo.quantize(model, "w8a8")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.trace(_method)?` is deprecated")
        expected = model(other)
        model(x)
        assert torch.equal(torch.jit.trace(model, x, check_trace=False)(other), expected)
        assert torch.equal(make_fx(model)(x)(other), expected)


def test_copies_start_empty() -> None:
    shared, x = SharedInput(), torch.randn(3, 4)
    shared.quantized(x, lambda: "k", ONE, Counted())
    for twin in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert twin._last is None
        twin.quantized(x, lambda: "k", ONE, Counted())


class Scale(OnCuda):
    """Counts how often its number was asked for."""

    asked = 0

    def item(self) -> float:
        Scale.asked += 1
        return super().item()


def test_a_static_layer_whose_first_call_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph cannot be recorded while the host waits for the scale's number; whoever runs eagerly asks once."""
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(5, 8)
    octavo.quantize(model, "w8a8-static", stats=octavo.calibrate(model, [x]), repair=False)
    layer, on_cuda = model[0], x.as_subclass(OnCuda)
    layer.input_scale = layer.input_scale.as_subclass(Scale)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Scale, "asked", 0)
    recorded = layer(on_cuda).as_subclass(Tensor)
    assert Scale.asked == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert torch.equal(layer(on_cuda).as_subclass(Tensor), recorded)
    assert Scale.asked == 1
    scale = layer.input_scale.as_subclass(Tensor).double()
    codes = (x.double() / scale).round().clamp(-127, 127)
    weight, weight_scale = (part.double() for part in layer.codes_and_scale())
    torch.testing.assert_close(recorded.double(), (codes * scale) @ (weight * weight_scale).T + layer.bias.double())


class Block(nn.Module):
    """What is shared in a transformer: one input for q, k and v, one for gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
        return self.down(torch.sigmoid(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("scheme", ["w8a8", "o2", "w8a8-static"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_quantizes_each_input_once(monkeypatch: pytest.MonkeyPatch, scheme: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(1100, 8)  # of a few rows each layer may quantize them itself
    stats = octavo.calibrate(model, [x])
    octavo.quantize(model, scheme, stats=stats, repair=False)
    name = {"w8a8": "quantize_per_token", "o2": "quantize_per_tensor", "w8a8-static": "quantize_static"}[scheme]
    real, calls = getattr(ops, name), []
    monkeypatch.setattr(ops, name, lambda *args: calls.append(args[0].shape) or real(*args))
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        model(x)
    assert [tuple(shape) for shape in calls] == [(1100, 8), (1100, 8), (1100, 8), (1100, 16)]


def test_layers_with_scales_of_their_own_share_nothing() -> None:
    """As checkpoints of others may have them, of layers that are fed one tensor."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(1100, 8)
    octavo.quantize(model, "w8a8-static", stats=octavo.calibrate(model, [x]), repair=False)
    model.k.set_input_scale(3 * model.q.input_scale)
    with torch.no_grad():
        alone = model.k(x.clone())
        assert not torch.equal(model.q(x), alone)
        assert torch.equal(model.k(x), alone)
        model.k.set_input_scale(model.q.input_scale)
        assert not torch.equal(model.k(x), alone), "the scale that it has now"


def test_sharing_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(5, 8)
    octavo.quantize(model, "w8a8")
    shared = model(x)
    monkeypatch.setattr(SharedInput, "quantized", lambda self, x, key, layer, quantize: quantize(x))
    assert torch.equal(model(x), shared)
