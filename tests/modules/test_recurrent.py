"""Recurrent int8 layers: what torch's compute in float64 with the weights that the codes stand for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import octavo
from octavo.modules import QuantModule
from octavo.modules.recurrent import QuantRecurrent, QuantRecurrentCell
from octavo.primitives import dequantize

K, H = 6, 10


def quantized(layer: nn.Module, **options: Any) -> tuple[Any, Any]:
    """The int8 layer, and the float one in float64 whose weights are what the codes stand for."""
    model, exact = nn.Sequential(layer), copy.deepcopy(layer).double()
    octavo.quantize(model, "w8a16", **options)
    int8 = model[0]
    assert isinstance(int8, QuantModule)
    for name, codes in int8.codes().items():
        getattr(exact, name).data = dequantize(*codes).double()
    return int8, exact


def parts(value: Any) -> list[Tensor]:
    """All tensors of what a layer returns."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [each for part in value for each in parts(part)]


def assert_close(ours: Any, exact: Any, tolerance: float = 1e-5) -> None:
    for our, their in zip(parts(ours), parts(exact), strict=True):
        torch.testing.assert_close(our.double(), their, rtol=tolerance, atol=tolerance)


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.double())
    return None if value is None else tuple(map(double, value))


def state_of(layer: Any, batch: int | None) -> Any:
    stacked = layer.num_layers * (1 + layer.bidirectional)
    between = () if batch is None else (batch,)
    h = torch.randn(stacked, *between, layer.proj_size or H)
    return (h, torch.randn(stacked, *between, H)) if isinstance(layer, nn.LSTM) else h


@given(
    cls=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    layers=st.integers(1, 3),
    batch=st.sampled_from([None, 1, 2, 5, 40]),
    steps=st.sampled_from([1, 2, 7]),
    relu=st.booleans(),
    projected=st.booleans(),
    options=st.fixed_dictionaries(dict.fromkeys(("bias", "bidirectional", "batch_first"), st.booleans())),
    given_state=st.booleans(),
    grad=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_layers(
    cls: Any, layers: int, batch: int | None, steps: int, relu: bool, projected: bool, options: dict[str, bool],
    given_state: bool, grad: bool,
) -> None:  # fmt: skip
    if cls is nn.RNN and relu:
        options = {**options, "nonlinearity": "relu"}  # type: ignore[dict-item]
    if cls is nn.LSTM and projected:
        options = {**options, "proj_size": 4}
    layer = cls(K, H, layers, **options)
    hx = state_of(layer, batch) if given_state else None
    int8, exact = quantized(layer)
    assert isinstance(int8, QuantRecurrent)
    shape = [steps] if batch is None else [batch, steps] if layer.batch_first else [steps, batch]
    x = torch.randn(*shape, K)
    with torch.set_grad_enabled(grad):
        assert_close(int8(x, hx), exact(double(x), double(hx)))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 4, 1], [2, 7, 5]])
@pytest.mark.parametrize("given_state", [False, True])
def test_packed_sequences(cls: Any, lengths: list[int], given_state: bool) -> None:
    layer = cls(K, H, 2, bidirectional=True)
    hx = state_of(layer, 3) if given_state else None
    int8, exact = quantized(layer)
    packed = pack_padded_sequence(torch.randn(7, 3, K), lengths, enforce_sorted=False)
    with torch.no_grad():
        ours, exactly = int8(packed, hx), exact(double(packed), double(hx))
    assert_close(ours, exactly)
    assert_close(pad_packed_sequence(ours[0])[0], pad_packed_sequence(exactly[0])[0])


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K)])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(cls: Any, shape: tuple[int, ...], bias: bool) -> None:
    cells = [cls(K, H, bias=bias)]
    if cls is nn.RNNCell:
        cells.append(nn.RNNCell(K, H, bias=bias, nonlinearity="relu"))
    for cell in cells:
        int8, exact = quantized(cell)
        assert isinstance(int8, QuantRecurrentCell)
        x, h = torch.randn(shape), torch.randn(*shape[:-1], H)
        hx = (h, torch.randn_like(h)) if cls is nn.LSTMCell else h
        assert_close(int8(x), exact(x.double()))
        assert_close(int8(x, hx), exact(x.double(), double(hx)))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(K, H, 2, bidirectional=True),
    "projected": lambda: nn.LSTM(K, H, proj_size=4),
    "gru": lambda: nn.GRU(K, H, 2),
    "rnn": lambda: nn.RNN(K, H),
    "lstm cell": lambda: nn.LSTMCell(K, H),
    "gru cell": lambda: nn.GRUCell(K, H),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_gradients_reach_the_input_and_the_biases(name: str) -> None:
    int8, exact = quantized(LAYERS[name]())
    x = torch.randn(3, 4, K)[..., 0, :] if "cell" in name else torch.randn(3, 4, K)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()

    def loss(found: Any) -> Tensor:
        return torch.stack([part.square().sum() for part in parts(found)]).sum()

    ours = torch.autograd.grad(loss(int8(x)), [x, *int8.parameters()])
    biases = [parameter for each, parameter in exact.named_parameters() if each.startswith("bias")]
    for our, their in zip(ours, torch.autograd.grad(loss(exact(wide)), [wide, *biases]), strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_is_the_same_wherever_it_goes(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(LAYERS[name]())
    octavo.quantize(model, "w8a16")
    x = torch.randn(2, K) if "cell" in name else torch.randn(3, 2, K)
    with torch.no_grad():
        expected = parts(model(x))
        octavo.save(model, tmp_path / "out")
        loaded = octavo.load(tmp_path / "out", model=nn.Sequential(LAYERS[name]()))
        for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(map(torch.equal, parts(twin(x)), expected))
    assert repr(model) == repr(loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_in_16_bits(name: str, dtype: torch.dtype) -> None:
    int8, exact = quantized(LAYERS[name]())
    x = torch.randn(4, K) if "cell" in name else torch.randn(9, 4, K)
    with torch.no_grad():
        found = int8.to(dtype)(x.to(dtype))
        assert all(part.dtype == dtype for part in parts(found))
        assert_close(found, exact(x.to(dtype).double()), 0.03)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(int8.float()(x), exact(x.double()), 0.05)


@pytest.mark.parametrize("name", ["lstm", "gru", "lstm cell"])
def test_can_be_compiled(name: str) -> None:
    torch.compiler.reset()
    int8, _ = quantized(LAYERS[name]())
    x = torch.randn(2, K) if "cell" in name else torch.randn(3, 2, K)
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(parts(compiled(x)), parts(int8(x)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_in_groups() -> None:
    int8, exact = quantized(nn.GRU(8, 16), group_size=4)
    assert int8.weight_hh_l0_scale.shape == (48, 4)
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        assert_close(int8(x), exact(x.double()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_inputs(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A step in which codes are wrong would be off by much more; which error int8 may have is not exact."""
    layer = LAYERS[name]().to(dtype)
    model, exact = nn.Sequential(layer), copy.deepcopy(layer).double()
    report = octavo.quantize(model, "w8a8")
    assert {row.scheme for row in report.rows if "weight" in row.name} == {"w8a8"}
    x = (torch.randn(4, K) if "cell" in name else torch.randn(9, 4, K)).to(dtype)
    with torch.no_grad():
        expected = parts(model(x))
        for ours, theirs in zip(expected, parts(exact(x.double())), strict=True):
            assert ours.dtype == dtype and 0 < (ours.double() - theirs).norm() < 0.03 * theirs.norm()
        octavo.save(model, tmp_path / "out")
        loaded = octavo.load(tmp_path / "out", model=nn.Sequential(LAYERS[name]().to(dtype)))
        assert all(map(torch.equal, parts(loaded(x)), expected))
    by_formulas = parts(model(x))  # a gradient is wanted
    for ours, theirs in zip(by_formulas, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.03)


def test_static_scales_are_for_other_layers() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.GRU(K, H))
    report = octavo.quantize(model, "w8a8-static", stats=octavo.calibrate(model, [torch.randn(5, 2, K)]))
    schemes = {(row.scheme, row.reason) for row in report.rows if row.name.startswith("1.weight")}
    assert schemes == {("w8a8", "the inputs of GRU have dynamic scales")}


def test_drops_out_between_layers_in_training_only() -> None:
    int8, exact = quantized(nn.LSTM(K, H, 2, dropout=0.5))
    x = torch.randn(9, 3, K)
    assert int8.training and not torch.equal(int8(x)[0], int8(x)[0])
    assert_close(int8.eval()(x), exact.eval()(x.double()))


def test_no_sequences() -> None:
    int8, exact = quantized(nn.GRU(K, H))
    with torch.no_grad():
        assert_close(int8(torch.zeros(3, 0, K)), exact(torch.zeros(3, 0, K).double()))


def test_models_that_flatten_parameters_go_on() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(K, H)

        def forward(self, x: Tensor) -> Tensor:
            self.lstm.flatten_parameters()
            return self.lstm(x)[0]  # type: ignore[no-any-return]

    model = Model()
    octavo.quantize(model, "w8a16")
    assert model(torch.randn(3, 2, K)).shape == (3, 2, H)


def test_a_layer_whose_weights_are_made_elsewhere_stays_float() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.LSTM(K, H), "weight_hh_l0")
    with pytest.warns(octavo.OctavoWarning, match="its weight_hh_l0 is not a parameter but computed elsewhere"):
        octavo.quantize(nn.Sequential(layer), "w8a16")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lstm, _: lstm(torch.zeros(3, 2, 5)), r"input: shape is \[3, 2, 5\], expected \[T, B, K\] .*K=6"),
        (lambda lstm, _: lstm(torch.zeros(0, 2, K)), r"input: shape is \[0, 2, 6\], expected at least one step"),
        (lambda lstm, _: lstm(torch.zeros(1, 3, 2, K)), r"input: shape is \[1, 3, 2, 6\], expected"),
        (
            lambda lstm, _: lstm(torch.zeros(3, 2, K), (torch.zeros(1, 2, H), torch.zeros(1, 1, H))),
            r"hx: shapes are \[\[1, 2, 10\], \[1, 1, 10\]\], expected \[\[1, 2, 10\], \[1, 2, 10\]\]",
        ),
        (lambda _, cell: cell(torch.zeros(2, 5)), r"input: shape is \[2, 5\], expected \[B, K\] or \[K\] with K=6"),
    ],
)
def test_inputs_of_other_shapes_are_named(call: Callable[[Any, Any], Any], message: str) -> None:
    model = nn.Sequential(nn.LSTM(K, H), nn.GRUCell(K, H))
    octavo.quantize(model, "w8a16")
    with pytest.raises(octavo.QuantizeError, match=message):
        call(*model)
