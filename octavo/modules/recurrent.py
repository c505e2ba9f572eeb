"""Recurrent layers with int8 weights: nn.LSTM, nn.GRU, nn.RNN, and their cells.

    p = W_ih x + b_ih               [T, B, G * H], all steps in one product; G gates: 4 of an LSTM, 3 of a GRU, 1
    step t:  q = W_hh h + b_hh      [B, G * H], one product a step
             h, c = gates(p[t], q, h, c)

    LSTM     i, f, g, o = p + q     c = sigmoid(f) * c + sigmoid(i) * tanh(g)    h = sigmoid(o) * tanh(c), then W_hr h
    GRU      r, z, n                n = tanh(p_n + sigmoid(r) * q_n)             h = (1 - z) * n + z * h
    RNN                             h = tanh(p + q) or relu(p + q)

The formulas are those of torch.nn's documentation. Weights are int8. With int8 inputs, x and h are quantized per token
before each product. Everything else is computed in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from octavo import ops
from octavo.errors import QuantizeError
from octavo.modules.base import Codes, QuantModule
from octavo.modules.linear import linear_per_token
from octavo.recipe import Scheme

__all__ = ["QuantRecurrent", "QuantRecurrentCell", "recurrent_weights"]

State = tuple[Tensor, ...]
"""(h,), of an LSTM (h, c)."""

Gates = Callable[[Tensor, Tensor, State], State]


def recurrent_weights(layer: nn.Module) -> tuple[str, ...]:
    """Names of the weights of a recurrent layer or cell, in torch's order."""
    if isinstance(layer, nn.RNNBase):
        return tuple(name for names in layer._all_weights for name in names if name.startswith("weight"))
    return ("weight_ih", "weight_hh")


def _lstm(p: Tensor, q: Tensor, state: State) -> State:
    c = state[1]
    input_and_forget, cell, output = (p + q).split([2 * c.shape[-1], c.shape[-1], c.shape[-1]], -1)
    i, f = input_and_forget.sigmoid().chunk(2, -1)
    c = f * c + i * cell.tanh()
    return output.sigmoid() * c.tanh(), c


def _gru(p: Tensor, q: Tensor, state: State) -> State:
    (h,) = state
    sizes = [2 * h.shape[-1], h.shape[-1]]
    (p_gates, p_new), (q_gates, q_new) = p.split(sizes, -1), q.split(sizes, -1)
    r, z = (p_gates + q_gates).sigmoid().chunk(2, -1)
    new = torch.tanh(p_new + r * q_new)
    return (new + z * (h - new),)


def _tanh(p: Tensor, q: Tensor, state: State) -> State:
    return ((p + q).tanh(),)


def _relu(p: Tensor, q: Tensor, state: State) -> State:
    return ((p + q).relu(),)


FORMULAS: dict[str, Gates] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}
"""torch's name of the mode of a recurrent layer -> its formula."""


class _Recurrent(QuantModule):
    """weight_ih..., weight_hh..., weight_hr...: int8 [N, K], each with `*_scale` fp32 [N, 1] or [N, K/g].
    bias_ih..., bias_hh...: [N] float, if it has them."""

    mode: str

    def __init__(self, layer: Any, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        self.op_names = ("w8a16_linear",) if scheme.input is None else ("quantize_per_token", "w8a8_linear")
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        for name, parameter in layer._parameters.items():
            if name.startswith("bias"):
                self.register_parameter(name, parameter)

    def _linear(self, part: str, x: Tensor) -> Tensor:
        """x [..., K] times the weight of `part` (such as "ih_l0"), plus its bias."""
        (weight, scale), bias = self.codes_and_scale(f"weight_{part}"), self._parameters.get(f"bias_{part}")
        if self.scheme.input is None:
            return ops.w8a16_linear(x, weight, scale, bias)
        return linear_per_token(x, weight, scale, bias)

    def _zeros(self, x: Tensor, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=x.dtype, device=x.device)

    def _check(self, x: Tensor, dims: tuple[int, ...], shapes: str) -> None:
        if x.dim() not in dims or x.shape[-1] != self.input_size:
            raise QuantizeError(f"input: shape is {list(x.shape)}, expected {shapes} with K={self.input_size}")


class QuantRecurrent(_Recurrent):
    """nn.LSTM, nn.GRU or nn.RNN with int8 weights: any number of layers, both directions, projections, packed input."""

    def __init__(self, layer: Any, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        self.mode, self.num_layers, self.dropout = layer.mode, layer.num_layers, layer.dropout
        self.batch_first, self.bidirectional, self.proj_size = layer.batch_first, layer.bidirectional, layer.proj_size

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """As the float layer.

        input: [T, B, K] ([B, T, K] if batch_first), [T, K], or a PackedSequence.
        hx: the initial state h [layers * directions, B, H (or proj_size)], for an LSTM (h, c); None for zeros.
        Returns: (outputs [T, B, directions * H] in the form of the input, the final state).
        Raises: QuantizeError for an input or a state of another shape.
        """
        if isinstance(input, PackedSequence):
            before = self._state(input.data, hx, int(input.batch_sizes[0]), input.sorted_indices)
            y, after = self._layers(input.data, before, input.batch_sizes.tolist())
            packed = PackedSequence(y, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, self._as_given(after, input.unsorted_indices)
        self._check(input, (2, 3), "[B, T, K] or [T, K]" if self.batch_first else "[T, B, K] or [T, K]")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        if not len(x):
            raise QuantizeError(f"input: shape is {list(input.shape)}, expected at least one step")
        if not batched and hx is not None:
            hx = tuple(part.unsqueeze(1) for part in hx) if self.mode == "LSTM" else hx.unsqueeze(1)
        y, after = self._layers(x, self._state(x, hx, x.shape[1]), None)
        if not batched:
            return y.squeeze(1), self._as_given(tuple(part.squeeze(1) for part in after))
        return y.transpose(0, 1) if self.batch_first else y, self._as_given(after)

    def _state(self, x: Tensor, hx: Any, batch: int, order: Tensor | None = None) -> State:
        """The initial state. order: int64 [B], the order of the sequences in a packed input."""
        stacked = self.num_layers * (1 + self.bidirectional)
        shapes = [(stacked, batch, self.proj_size or self.hidden_size), (stacked, batch, self.hidden_size)]
        shapes = shapes if self.mode == "LSTM" else shapes[:1]
        if hx is None:
            return tuple(self._zeros(x, *shape) for shape in shapes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        if [tuple(part.shape) for part in given] != shapes:
            found, expected = [list(part.shape) for part in given], [list(shape) for shape in shapes]
            raise QuantizeError(f"hx: shapes are {found}, expected {expected}")
        return given if order is None else tuple(part.index_select(1, order) for part in given)

    def _as_given(self, state: State, order: Tensor | None = None) -> Any:
        state = state if order is None else tuple(part.index_select(1, order) for part in state)
        return state if self.mode == "LSTM" else state[0]

    def _layers(self, x: Tensor, before: State, sizes: list[int] | None) -> tuple[Tensor, State]:
        """All layers, one after the other. sizes: for packed sequences, the number of sequences that have each step."""
        after: list[State] = []
        for layer in range(self.num_layers):
            directions = []
            for suffix in [f"l{layer}", f"l{layer}_reverse"][: 1 + self.bidirectional]:
                p = self._linear(f"ih_{suffix}", x)
                y, state = self._direction(p, suffix, tuple(part[len(after)] for part in before), sizes)
                directions.append(y)
                after.append(state)
            x = torch.cat(directions, -1) if self.bidirectional else directions[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, tuple(map(torch.stack, zip(*after, strict=True)))

    def _direction(self, p: Tensor, suffix: str, state: State, sizes: list[int] | None) -> tuple[Tensor, State]:
        """One layer in one direction. p: [T, B, G * H]. Returns: its outputs [T, B, H], and the final state."""
        if sizes is None and not self.proj_size:
            hidden, bias = self.codes_and_scale(f"weight_hh_{suffix}"), self._parameters.get(f"bias_hh_{suffix}")
            at_once = ops.recurrent(
                self.mode, p, *hidden, bias, state,
                int8_inputs=self.scheme.input is not None, backwards=suffix.endswith("_reverse"),
            )  # fmt: skip
            if at_once is not None:
                return at_once
        outputs, state = self._steps(p.split(sizes) if sizes else p.unbind(), suffix, state)
        return torch.cat(outputs) if sizes else torch.stack(outputs), state

    def _steps(self, steps: Sequence[Tensor], suffix: str, state: State) -> tuple[list[Tensor], State]:
        """One layer in one direction, step by step.

        steps: p [b, G * H] for each step. For packed sequences b is the number of sequences that have the step, the
        longest first. The state of the others waits until they begin (backwards), or is final already (forwards).
        """
        gates = FORMULAS[self.mode]
        outputs: list[Tensor] = []
        for p in reversed(steps) if suffix.endswith("_reverse") else steps:
            waiting = [part[len(p) :] for part in state] if len(p) < len(state[0]) else []
            now = tuple(part[: len(p)] for part in state) if waiting else state
            now = gates(p, self._linear(f"hh_{suffix}", now[0]), now)
            if self.proj_size:
                now = (self._linear(f"hr_{suffix}", now[0]), *now[1:])
            outputs.append(now[0])
            state = tuple(map(torch.cat, zip(now, waiting, strict=True))) if waiting else now
        return outputs[::-1] if suffix.endswith("_reverse") else outputs, state

    def flatten_parameters(self) -> None:
        """Does nothing. Models call it on recurrent layers, to make their float weights contiguous for cuDNN."""

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, {', '.join(self._options())}"

    def _options(self) -> Iterator[str]:
        options = {"num_layers": 1, "batch_first": False, "dropout": 0.0, "bidirectional": False, "proj_size": 0}
        for name, usual in options.items():
            if getattr(self, name) != usual:
                yield f"{name}={getattr(self, name)}"
        yield str(self.scheme)


class QuantRecurrentCell(_Recurrent):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell with int8 weights: one step."""

    def __init__(self, layer: Any, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        if isinstance(layer, nn.RNNCell):
            self.mode = f"RNN_{layer.nonlinearity.upper()}"
        else:
            self.mode = "LSTM" if isinstance(layer, nn.LSTMCell) else "GRU"

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As the float cell. input: [B, K] or [K]. hx: the state before, h [B, H], for an LSTM (h, c); None for zeros.

        Returns: the state after the step. Raises: QuantizeError for an input of another shape.
        """
        self._check(input, (1, 2), "[B, K] or [K]")
        is_lstm = self.mode == "LSTM"
        if hx is None:
            zeros = self._zeros(input, *input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if is_lstm else zeros
        state = tuple(hx) if is_lstm else (hx,)
        after = FORMULAS[self.mode](self._linear("ih", input), self._linear("hh", state[0]), state)
        return after if is_lstm else after[0]

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, {self.scheme}"
