from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import octavo
from octavo.errors import EvaluateError, OctavoError, OctavoWarning
from octavo.evaluate import compare, outputs, perplexity, sqnr
from tests.evaluate.truth import fixed, log_softmax


class Noisy(nn.Module):
    """Stands for a quantized layer: a float layer whose output is multiplied by 1 + error."""

    quantized_params = ("weight",)

    def __init__(self, layer: nn.Module, error: float) -> None:
        super().__init__()
        self.layer, self.error = layer, error

    def forward(self, *args: Any) -> Any:
        out = self.layer(*args)
        return (out[0] * (1 + self.error), *out[1:]) if isinstance(out, tuple) else out * (1 + self.error)


def with_noise(model: nn.Module, errors: dict[str, float]) -> nn.Module:
    noisy = copy.deepcopy(model)
    for name, error in errors.items():
        noisy.set_submodule(name, Noisy(noisy.get_submodule(name), error))
    return noisy


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# The truth for everything below: plain loops over rows in numpy float64.


def truth(f: Tensor, q: Tensor) -> dict[str, float]:
    rows = list(zip(f.double().numpy(), q.double().numpy(), strict=True))
    kl = [float((np.exp(log_softmax(a)) * (log_softmax(a) - log_softmax(b))).sum()) for a, b in rows]
    cosine = [float(a @ b / math.sqrt((a @ a) * (b @ b))) for a, b in rows]
    return {
        "kl": sum(kl) / len(kl),
        "top1": sum(int(a.argmax() == b.argmax()) for a, b in rows) / len(rows),
        "sqnr_db": 10 * math.log10(sum(a @ a for a, _ in rows) / sum((a - b) @ (a - b) for a, b in rows)),
        "cosine_mean": sum(cosine) / len(cosine),
        "cosine_min": min(cosine),
    }


# --- sqnr -------------------------------------------------------------------------------------------------------------


def test_sqnr_of_an_error_of_a_tenth_is_20_db() -> None:
    x = torch.randn(7, 9, dtype=torch.float64)
    assert sqnr(x, x * 1.1) == pytest.approx(20.0, abs=1e-9)
    assert sqnr(x, x * 0.99) == pytest.approx(40.0, abs=1e-9)


def test_sqnr_over_many_chunks_is_the_sqnr_of_the_whole() -> None:
    x = torch.randn(3, outputs.CHUNK_ELEMENTS)
    y = x + 0.01 * torch.randn_like(x)
    a, b = x.double().numpy().ravel(), y.double().numpy().ravel()
    assert sqnr(x, y) == pytest.approx(10 * math.log10(a @ a / ((a - b) @ (a - b))), abs=1e-9)


def test_sqnr_at_the_edges() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert sqnr(one, one) == math.inf
    assert sqnr(zero, zero) == math.inf
    assert sqnr(torch.empty(0, 4), torch.empty(0, 4)) == math.inf
    assert sqnr(zero, one) == -math.inf
    assert math.isnan(sqnr(one, one * math.nan))
    assert math.isnan(sqnr(one * math.inf, one * math.inf))
    assert sqnr(torch.tensor(2.0), torch.tensor(1.0)) == pytest.approx(10 * math.log10(4))
    # fp16 holds no 300 ** 2: the sum is not in the dtype of the tensors.
    assert sqnr(torch.full((4,), 300.0).half(), torch.full((4,), 303.0).half()) == pytest.approx(40.0, abs=1e-9)


def test_sqnr_of_different_shapes_is_an_error() -> None:
    with pytest.raises(EvaluateError, match=r"\[2, 1\].*\[2\]"):
        sqnr(torch.ones(2, 1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_sqnr_of_what_is_not_floating_point_is_an_error(dtype: torch.dtype) -> None:
    x = torch.ones(2)
    with pytest.raises(EvaluateError, match=rf"reference is {dtype}, expected floating point"):
        sqnr(x.to(dtype), x)
    with pytest.raises(EvaluateError, match=rf"actual is {dtype}, expected floating point"):
        sqnr(x, x.to(dtype))


def test_sqnr_of_an_array_is_an_error() -> None:
    with pytest.raises(EvaluateError, match=r"actual is a ndarray, expected a tensor; torch\.as_tensor makes one"):
        sqnr(torch.ones(2), np.ones(2))  # type: ignore[arg-type]


# --- compare: the output ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(2, 9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(1, 50),
)
def test_compare_is_what_loops_in_float64_say(rows: list[int], columns: int, dtype: torch.dtype, chunk: int) -> None:
    torch.manual_seed(sum(rows) * columns + chunk)
    f = [(3 * torch.randn(1, n, columns)).to(dtype) for n in rows]
    q = [x + (0.3 * torch.randn(x.shape)).to(dtype) for x in f]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "CHUNK_ELEMENTS", chunk)
        found = compare(fixed(*f), fixed(*q), [torch.zeros(1)] * len(rows))
    assert found.batches == len(rows) and found.positions == sum(rows)
    everything = truth(torch.cat(f, 1)[0], torch.cat(q, 1)[0])
    assert {name: getattr(found, name) for name in everything} == pytest.approx(everything, rel=1e-9, abs=1e-12)


def test_a_model_against_itself_is_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    found = compare(model, model, [torch.randn(5, 4)])
    assert (found.kl, found.top1, found.sqnr_db) == (0.0, 1.0, math.inf)
    assert found.cosine_mean == pytest.approx(1.0, abs=1e-12) and 1 - 1e-12 <= found.cosine_min <= 1.0
    assert found.layers == () and found.not_compared == ()


@pytest.mark.parametrize("db", [6.0, 20.0, 43.5])
def test_a_known_error_has_the_known_sqnr(db: float) -> None:
    signal = torch.randn(2, 16, 32, dtype=torch.float64)
    noise = torch.randn_like(signal)
    noise *= signal.norm() / noise.norm() * 10 ** (-db / 20)
    assert compare(fixed(signal), fixed(signal + noise), [torch.zeros(1)]).sqnr_db == pytest.approx(db, abs=1e-9)


@pytest.mark.parametrize(
    ("f", "q", "same"),
    [
        ([1.0, 5.0, 5.0], [1.0, 5.5, 5.0], True),  # 1 and 1
        ([1.0, 5.0, 5.0], [1.0, 5.0, 5.5], False),  # 1 and 2: a tie in the float model alone
        ([0.0, 1.0, 2.0], [0.0, 2.0, 2.0], False),  # 2 and 1: in the int8 model alone
        ([0.0, 5.0, 5.0], [0.0, 4.0, 4.0], True),  # 1 and 1: in both, between the same
        ([5.0, 5.0, 1.0], [1.0, 5.0, 5.0], False),  # 0 and 1: in both, between others
    ],
)
def test_of_equal_highest_logits_the_first_is_chosen(f: list[float], q: list[float], same: bool) -> None:
    """As `list.index` finds it, and greedy decoding: where two models would write other tokens, they do not agree."""
    assert (f.index(max(f)) == q.index(max(q))) is same
    found = compare(fixed(torch.tensor([f])), fixed(torch.tensor([q])), [torch.zeros(1)])
    assert found.top1 == float(same)


def test_forbidden_tokens_count_as_equal() -> None:
    f, q = torch.randn(4, 6), torch.randn(4, 6)
    forbidden = torch.full((4, 2), -math.inf)
    plain = compare(fixed(f), fixed(q), [torch.zeros(1)])
    found = compare(fixed(torch.cat([f, forbidden], 1)), fixed(torch.cat([q, forbidden], 1)), [torch.zeros(1)])
    for name in ("kl", "top1", "sqnr_db", "cosine_mean", "cosine_min"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-12)


def test_rounding_carries_no_measure_past_its_bound() -> None:
    f = 30 * torch.randn(200, 1, 7, dtype=torch.float64)
    for row, other in zip(f, f * (1 + 1e-15), strict=True):
        found = compare(fixed(row), fixed(other), [torch.zeros(1)])
        assert found.kl is not None and 0 <= found.kl < 1e-12
        assert 1 - 1e-12 < found.cosine_min <= 1.0


def test_cosine_of_rows_of_zeros() -> None:
    f, q = torch.zeros(2, 3), torch.zeros(2, 3)
    q[1, 0] = 1e-30
    found = compare(fixed(f), fixed(q), [torch.zeros(1)])
    assert (found.cosine_mean, found.cosine_min) == (0.5, 0.0)
    assert found.sqnr_db == -math.inf and found.to_dict()["sqnr_db"] is None


@pytest.mark.parametrize(
    ("wrap", "logits"),
    [
        (lambda x: x, True),
        (lambda x: types.SimpleNamespace(logits=x), True),
        (lambda x: types.SimpleNamespace(last_hidden_state=x), False),
        (lambda x: {"loss": torch.tensor(1.0), "logits": x}, True),
        (lambda x: {"loss": torch.tensor(1.0), "start_logits": x}, True),
        (lambda x: {"ids": torch.zeros(1, dtype=torch.int64), "embedding": x}, False),
        (lambda x: (x, torch.zeros(9)), True),
        (lambda x: [torch.tensor(0.5), x], True),
    ],
)
def test_every_kind_of_output_is_understood(wrap: Callable[[Tensor], Any], logits: bool) -> None:
    f, q = torch.randn(2, 5), torch.randn(2, 5)
    found = compare(fixed(wrap(f)), fixed(wrap(q)), [torch.zeros(1)])
    expected = truth(f, q)
    if not logits:
        assert found.kl is None and found.top1 is None
        del expected["kl"], expected["top1"]
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-9)


def test_one_number_a_row_is_not_logits() -> None:
    found = compare(fixed(torch.randn(4, 1)), fixed(torch.randn(4, 1)), [torch.zeros(1)])
    assert found.kl is None and found.top1 is None and found.positions == 4


def test_batches_are_fed_as_the_forward_takes_them() -> None:
    calls: list[Any] = []

    def model(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return torch.ones(1, 2)

    x, y = torch.ones(1), torch.zeros(1)
    steps: list[tuple[int, int]] = []
    found = compare(model, model, [x, (x, y), {"a": x, "flag": True}], progress=lambda *step: steps.append(step))
    assert calls[::2] == [((x,), {}), ((x, y), {}), ((), {"a": x, "flag": True})]
    assert calls[1::2] == calls[::2]
    assert steps == [(1, 3), (2, 3), (3, 3)] and found.batches == 3
    steps.clear()
    compare(model, model, (batch for batch in [x, x]), progress=lambda *step: steps.append(step))
    assert steps == [(1, 0), (2, 0)]


def test_padded_positions_do_not_count() -> None:
    f, q = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    f[mask == 0] = math.nan
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": mask}
    found = compare(fixed(f), fixed(q), [batch])
    expected = truth(f[mask == 1], q[mask == 1])
    assert found.positions == 6
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-9)


def test_a_mask_does_not_touch_a_pooled_output() -> None:
    batch = {"attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])}
    for columns in (3, 5):
        assert compare(fixed(torch.randn(3, columns)), fixed(torch.randn(3, columns)), [batch]).positions == 3


@pytest.mark.parametrize(("masked", "tokens"), [(True, 4), (False, 4), (True, 6)])
def test_a_decoders_output_has_the_decoders_padding(masked: bool, tokens: int) -> None:
    """Though the encoder may be fed as many tokens, so that its mask would fit; no warning where it does not."""
    f, q = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    own = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]) if masked else torch.ones(2, 4)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.eye(tokens)[:2], "decoder_input_ids": ids}
    found = compare(fixed(f), fixed(q), [batch | ({"decoder_attention_mask": own} if masked else {})])
    expected = truth(f[own == 1], q[own == 1])
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
def test_labels_have_the_decoders_padding(is_encoder_decoder: bool) -> None:
    """Of which an encoder-decoder makes the decoder's input; to others they say what a loss is of."""
    f, q = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask, labels = torch.tensor([[1, 0, 0, 0]] * 2), torch.tensor([[3, 0, 5, -100], [1, 2, -100, -100]])
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": mask, "labels": labels}
    model = fixed(f)
    model.config = types.SimpleNamespace(is_encoder_decoder=is_encoder_decoder)  # type: ignore[attr-defined]
    found = compare(model, fixed(q), [batch])
    counts = labels != -100 if is_encoder_decoder else mask == 1
    expected = truth(f[counts], q[counts])
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-9)


def test_a_transformers_t5_makes_its_input_of_labels() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    names = [name for name, module in model.named_modules() if name.rpartition(".")[2] in ("q", "v", "o", "wi")]
    noisy = with_noise(model, dict.fromkeys(names, 0.01))
    labels = torch.randint(1, 64, (2, 6))
    labels[0, 4:] = -100
    batch = {"input_ids": torch.randint(1, 64, (2, 6)), "attention_mask": torch.tensor([[1] * 2 + [0] * 4, [1] * 6])}
    spelled_out = {"decoder_input_ids": model._shift_right(labels), "decoder_attention_mask": (labels != -100).long()}
    found, expected = (compare(model, noisy, [batch | more]) for more in ({"labels": labels}, spelled_out))
    assert found.positions == 10
    for name in ("kl", "top1", "sqnr_db", "cosine_mean", "cosine_min"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4)


def test_a_mask_that_fits_no_output_is_a_warning_once() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0]])}
    outputs = [torch.randn(1, 2, 5)] * 4
    with pytest.warns(
        OctavoWarning, match=r"batch 0: attention_mask has shape \[1, 4\], the output \[1, 2, 5\]"
    ) as seen:
        found = compare(fixed(*outputs), fixed(*outputs), [batch, batch])
    assert len(seen) == 1 and seen[0].filename == __file__ and found.positions == 4
    whole = {"attention_mask": torch.ones(1, 4)}
    assert compare(fixed(*outputs), fixed(*outputs), [whole]).positions == 2


@pytest.mark.parametrize(
    ("f", "q", "why"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"batch 0: .*\[2, 3\].*\[2, 4\]"),
        (torch.ones(2, 3), torch.full((2, 3), math.nan), "batch 0: the int8 model's output holds NaN"),
        (torch.full((2, 3), math.nan), torch.full((2, 3), math.nan), "the float model's output holds NaN"),
        (torch.ones(2, 3), torch.full((2, 3), math.inf), "the int8 model's output holds inf"),
        (torch.ones(2, 3), torch.full((2, 3), -math.inf), "the int8 model's output holds inf"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3, dtype=torch.int64),
            "batch 0: the int8 model returned a tensor of torch.int64",
        ),
        ("text", torch.ones(1), "the float model returned a str"),
        ({}, torch.ones(1), "the float model returned a dict"),
        ((), torch.ones(1), "the float model returned a tuple"),
        (None, torch.ones(1), "the float model returned a NoneType"),
    ],
)
def test_outputs_that_cannot_be_compared(f: Any, q: Any, why: str) -> None:
    with pytest.raises(EvaluateError, match=why):
        compare(fixed(f), fixed(q), [torch.zeros(1)])


@pytest.mark.parametrize(
    ("batches", "why"),
    [
        (torch.ones(3, 2), r"batches is one Tensor, .* write \[batch\]"),
        ({"x": torch.ones(1)}, "batches is one dict"),
        ([], "got 0 with no position.*an iterator can be read only once"),
        (["text"], "batch 0: the float model was to be fed a str"),
        ([{"attention_mask": torch.zeros(1, 2)}], "got 1 with no position"),
        ([torch.ones(0, 2)], "got 1 with no position"),
    ],
)
def test_batches_that_cannot_be_fed(batches: Any, why: str) -> None:
    def model(x: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        return torch.ones(1, 2, 3) if x is None else x

    with pytest.raises(EvaluateError, match=why):
        compare(model, model, batches)


def test_errors_are_of_octavos_tree() -> None:
    assert issubclass(EvaluateError, OctavoError) and issubclass(EvaluateError, ValueError)


# --- compare: the layers ----------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)
    ).double()


def test_layers_have_the_sqnr_of_the_error_that_was_put_in() -> None:
    model = mlp()
    found = compare(model, with_noise(model, {"4": 0.01}), [torch.randn(3, 6).double(), torch.randn(8, 6).double()])
    assert [(layer.name, layer.kind) for layer in found.layers] == [("4", "Noisy")]
    assert found.layers[0].sqnr_db == pytest.approx(40.0, abs=1e-9)
    assert found.sqnr_db == pytest.approx(40.0, abs=1e-9)


def test_a_layers_sqnr_is_over_all_batches_and_holds_what_came_before_it() -> None:
    model = mlp()
    noisy = with_noise(model, {"0": 0.1, "2": 0.001, "4": 0.0})
    batches = [torch.randn(3, 6).double(), 100 * torch.randn(8, 6).double()]
    found = compare(model, noisy, batches)
    with torch.no_grad():
        wanted = {}
        for name, end in (("0", 1), ("2", 3), ("4", 5)):
            # The inplace ReLU comes after layer 0: what it overwrites must not be what is compared.
            f = torch.cat([model[:end](batch.clone()) for batch in batches])
            q = torch.cat([noisy[:end](batch.clone()) for batch in batches])
            wanted[name] = sqnr(f, q)
    assert {layer.name: layer.sqnr_db for layer in found.layers} == pytest.approx(wanted, rel=1e-12)
    assert wanted["0"] == pytest.approx(20.0)


def test_an_exact_layer_is_inf_here_and_null_in_json() -> None:
    model = mlp()
    found = compare(model, with_noise(model, {"0": 0.0}), [torch.randn(3, 6).double()])
    assert found.layers[0].sqnr_db == math.inf
    assert found.to_dict()["layers"][0]["sqnr_db"] is None


def test_layers_can_be_left_out_and_plain_callables_have_none() -> None:
    model = mlp()
    noisy = with_noise(model, {"0": 0.1})
    batches = [torch.randn(3, 6).double()]
    assert compare(model, noisy, batches, layers=False).layers == ()
    wrapped = compare(lambda x: model(x), noisy, batches)
    assert wrapped.layers == () and wrapped.sqnr_db == compare(model, noisy, batches).sqnr_db


class Odd(nn.Module):
    """Layers that cannot be compared, one for each reason."""

    def __init__(self, int8: bool) -> None:
        super().__init__()
        self.int8 = int8
        for name in ("idle", "twice", "once", "broken", "silent", "good"):
            layer = nn.Identity()
            self.add_module(name, Noisy(layer, 0.01) if int8 else layer)
        self.shaped = Shaped(int8)
        self.counting = Counting()
        if int8:
            self.new = Noisy(nn.Identity(), 0.0)
            self.shaped.quantized_params = self.counting.quantized_params = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if self.int8 else 1):
            self.twice(x)
        for _ in range(1 if self.int8 else 2):
            self.once(x)
        self.broken(x * math.nan)
        self.silent(x * 0 + self.int8)
        self.shaped(x)
        self.counting(x)
        if self.int8:
            self.new(x)
        return self.good(x)


class Shaped(nn.Module):
    def __init__(self, int8: bool) -> None:
        super().__init__()
        self.int8 = int8

    def forward(self, x: Tensor) -> Tensor:
        return x[:1] if self.int8 else x


class Counting(nn.Module):
    def forward(self, x: Tensor) -> int:
        return len(x)


def test_a_layer_that_cannot_be_compared_says_why() -> None:
    found = compare(Odd(False), Odd(True), [torch.randn(3, 2).double()] * 2)
    assert [layer.name for layer in found.layers] == ["good"]
    assert found.layers[0].sqnr_db == pytest.approx(40.0, abs=1e-9)
    assert {layer.name: layer.reason for layer in found.not_compared} == {
        "idle": "did not run",
        "twice": "runs more often in the int8 model than in the float model",
        "once": "runs more often in the float model than in the int8 model",
        "broken": "its output holds NaN or inf",
        "silent": "its float output is all zeros, its int8 output is not",
        "shaped": "output shape is [3, 2] in float, [1, 2] in int8",
        "counting": "its output has no floating-point tensor",
        "new": "the float model has no module of this name",
    }


def test_a_layer_called_several_times_is_compared_call_by_call() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.cell(x)
            return x

    model = Loop()
    found = compare(model, with_noise(model, {"cell": 0.0}), [torch.randn(2, 3).double()])
    assert found.layers[0].sqnr_db == math.inf and found.not_compared == ()


def test_padding_does_not_count_in_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    model = Model()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[mask == 0] = math.nan
    found = compare(model, with_noise(model, {"layer": 0.01}), [{"x": x, "attention_mask": mask}])
    assert found.layers[0].sqnr_db == pytest.approx(40.0, abs=1e-9) and found.positions == 3


@pytest.mark.parametrize("failing", ["float", "int8", "batches", "progress"])
def test_hooks_are_removed_and_modes_restored_whatever_happens(failing: str) -> None:
    model = mlp().train()
    noisy = with_noise(model, {"0": 0.1, "4": 0.1}).train()
    noisy.get_submodule("4").eval()

    def fail(*args: Any) -> Any:
        raise RuntimeError("on purpose")

    def batches() -> Any:
        yield torch.randn(2, 6).double()
        if failing == "batches":
            fail()

    if failing in ("float", "int8"):
        (model if failing == "float" else noisy).get_submodule("3").forward = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="on purpose"):
        compare(model, noisy, batches(), progress=fail if failing == "progress" else None)
    assert hook_count(model) == hook_count(noisy) == 0
    assert model.training and noisy.training and not noisy.get_submodule("4").training
    assert torch.is_grad_enabled()


def test_both_models_draw_the_same_random_numbers_and_each_batch_others() -> None:
    drawn: list[float] = []

    def model(x: Tensor) -> Tensor:
        drawn.append(float(torch.rand(())))
        return x + drawn[-1]

    x = torch.randn(2, 6)
    torch.manual_seed(0)
    assert compare(model, model, [x, x]).sqnr_db == math.inf
    torch.manual_seed(0)
    assert drawn == [float(noise) for noise in torch.rand(2).repeat_interleave(2)]


def test_hooks_are_removed_and_others_hooks_stay() -> None:
    model = mlp()
    noisy = with_noise(model, {"0": 0.1})
    noisy.get_submodule("0").register_forward_hook(lambda *args: None)
    compare(model, noisy, [torch.randn(2, 6).double()])
    assert (hook_count(model), hook_count(noisy)) == (0, 1)


def test_compare_is_deterministic() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 50)).train()
    noisy = with_noise(model, {"0": 0.02, "2": 0.03})
    batches = [torch.randn(40, 6) for _ in range(3)]
    assert compare(model, noisy, batches) == compare(model, noisy, batches)


# --- compare: real architectures --------------------------------------------------------------------------------------


def test_a_torch_transformer_whose_fast_path_runs_no_submodule() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    noisy = copy.deepcopy(model)
    for encoder in noisy.layers:
        for part in (encoder.self_attn, encoder.self_attn.out_proj, encoder.linear1, encoder.linear2):
            part.quantized_params = ("weight",)
    with torch.no_grad():
        noisy.layers[0].self_attn.out_proj.weight.mul_(1.01)
        noisy.layers[0].self_attn.out_proj.bias.mul_(1.01)
    found = compare(model, noisy, [torch.randn(3, 5, 16)])
    parts = ("self_attn", "self_attn.out_proj", "linear1", "linear2")  # attention multiplies with out_proj, uncalled
    assert [layer.name for layer in found.layers] == [f"layers.{i}.{part}" for i in (0, 1) for part in parts]
    assert [found.layers[i].sqnr_db for i in (0, 1)] == pytest.approx([40.0, 40.0], abs=1e-3)
    assert not found.not_compared


def test_a_torch_transformer_whose_fast_path_leaves_the_padding_out() -> None:
    """The float model computed on nested tensors, and gave zeros for what is padding; an int8 model has no such way."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    int8 = copy.deepcopy(model)
    octavo.quantize(int8, "w8a8")
    mask = torch.arange(5) >= torch.tensor([[3], [5], [2]])
    found = compare(model, int8, [{"src": torch.randn(3, 5, 16), "src_key_padding_mask": mask}])
    assert found.sqnr_db > 40 and all(layer.sqnr_db > 35 for layer in found.layers)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_transformers_llama_with_padding() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    noisy = with_noise(model, dict.fromkeys(names, 0.01))
    ids = torch.randint(0, 64, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = compare(model, noisy, [{"input_ids": ids, "attention_mask": mask}])
    assert [layer.name for layer in found.layers] == names and len(names) == 14
    assert found.layers[0].sqnr_db == pytest.approx(40.0, abs=1e-3)
    with torch.no_grad():
        f, q = (each(input_ids=ids, attention_mask=mask).logits[mask == 1] for each in (model, noisy))
    expected = truth(f, q)
    assert found.positions == 16
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-6)

    row = torch.randint(0, 64, (20,))
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) * (len(w) - 1) for w in row.split(8)]
    assert perplexity(model, row, window=8) == pytest.approx(math.exp(sum(losses) / (7 + 7 + 3)), rel=1e-6)


def test_a_model_quantized_by_octavo() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40)).eval()
    int8 = copy.deepcopy(model)
    octavo.quantize(int8, "w8a16")
    x = torch.randn(50, 64)
    found = compare(model, int8, [x])
    weight = model[0].weight.detach().double().numpy()
    scale = (np.abs(weight).max(1, keepdims=True).astype(np.float32) / np.float32(127)).astype(np.float64)
    rounded = np.round(weight / scale) * scale
    f = x.double().numpy() @ weight.T + model[0].bias.detach().double().numpy()
    error = x.double().numpy() @ (rounded - weight).T
    assert [(layer.name, layer.kind) for layer in found.layers] == [("0", "QuantLinear"), ("2", "QuantLinear")]
    assert found.layers[0].sqnr_db == pytest.approx(10 * math.log10((f**2).sum() / (error**2).sum()), abs=1e-3)
    assert found.top1 is not None and found.top1 > 0.9


def test_what_smoothing_divided_an_output_by_is_no_error_of_its_layer() -> None:
    model = mlp().float()
    model[0].weight.data[:5] *= 50
    x = torch.randn(200, 6)
    original = copy.deepcopy(model)
    stats = octavo.calibrate(model, [x])
    octavo.smooth(model, stats)
    smoothed = copy.deepcopy(model)
    octavo.quantize(model, "w8a16")
    with torch.no_grad():
        wanted, as_they_are = {}, {}
        for name, end in (("0", 1), ("2", 3), ("4", 5)):
            f, s, q = (each[:end](x.clone()) for each in (original, smoothed, model))
            wanted[name] = sqnr(f, q * (f.norm(dim=0) / s.norm(dim=0)).log2().round().exp2())
            as_they_are[name] = sqnr(s, q)
    assert sqnr(original[0](x), model[0](x)) < 10 < 30 < min(wanted.values())
    found, to_smoothed = (compare(of, model, [x[:100], x[100:]]) for of in (original, smoothed))
    assert {layer.name: layer.sqnr_db for layer in found.layers} == pytest.approx(wanted, abs=1e-3)
    assert {layer.name: layer.sqnr_db for layer in to_smoothed.layers} == pytest.approx(as_they_are, abs=1e-3)
