"""Which attentions are recognized, by what the functions that they name compute; and that stand-ins give the same
bits."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo import ops
from octavo.fused.rotary import FusedRotary, fused_rotaries
from octavo.ops import dispatch, eager
from tests.ops.native.kernels import WITH_KERNELS
from tests.tiny_models import llama, qwen3_moe

pytest.importorskip("transformers")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

RECOGNIZED = [
    "llama.LlamaAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention", "qwen3_moe.Qwen3MoeAttention",
    "mistral.MistralAttention", "mixtral.MixtralAttention", "gemma2.Gemma2Attention", "gemma3.Gemma3Attention",
    "phi.PhiAttention", "phi3.Phi3Attention", "olmo2.Olmo2Attention", "smollm3.SmolLM3Attention",
    "granite.GraniteAttention", "stablelm.StableLmAttention", "gpt_neox.GPTNeoXAttention",
]  # fmt: skip
LEFT = [
    "cohere.CohereAttention",  # turns neighbours, in fp32
    "gpt_oss.GptOssAttention",  # cos and sin are of half a head
    "gptj.GPTJAttention",  # turns neighbours
    "bert.BertSelfAttention",  # turns nothing
]


def class_of(name: str) -> Any:
    folder, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), cls)


def blank(cls: type[nn.Module]) -> nn.Module:
    """A module of the class that holds nothing: which class it is, is all that is asked."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module


@pytest.mark.parametrize("name", RECOGNIZED)
def test_attentions_of_models_are_recognized(name: str) -> None:
    cls = class_of(name)
    found = fused_rotaries(nn.Sequential(blank(cls)))["0"]
    assert isinstance(found, cls) and isinstance(found, FusedRotary)


@pytest.mark.parametrize("name", LEFT)
def test_what_computes_something_else_is_left(name: str) -> None:
    assert not fused_rotaries(nn.Sequential(blank(class_of(name))))


# -- by what is computed, whatever it is called ----------------------------------------------------------------------


def halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    return one(q), one(k)


def other_sign(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return halves(q, k, cos, -sin)


def wider(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds once."""
    y, z = halves(q.float(), k.float(), cos.float(), sin.float())
    return y.to(q.dtype), z.to(k.dtype)


def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    y, z = halves(q, k, cos, sin)
    return q.copy_(y), k.copy_(z)


def keys_are_left(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return halves(q, k, cos, sin)[0], k


def never_called(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("it takes no cos and sin, and might do anything")


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return halves(q, k, cos, sin)


class Decorated(Plain):
    @decorated
    @decorated
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, twice: bool = False) -> Any:
        y, z = halves(q, k, cos, sin)
        return super().forward(y, z, cos, sin) if twice else (y, z)


class OtherSign(nn.Module):
    def forward(self, *args: Tensor) -> Any:
        return other_sign(*args)


class Wider(nn.Module):
    def forward(self, *args: Tensor) -> Any:
        return wider(*args)


class InPlace(nn.Module):
    def forward(self, *args: Tensor) -> Any:
        return in_place(*args)


class KeysAreLeft(nn.Module):
    def forward(self, *args: Tensor) -> Any:
        return keys_are_left(*args)


class NeverCalled(nn.Module):
    def forward(self, *args: Tensor) -> Any:
        return never_called(*args)


@pytest.mark.parametrize("cls", [OtherSign, Wider, InPlace, KeysAreLeft, NeverCalled])
def test_what_gives_other_bits_or_changes_its_operands_is_left(cls: type[nn.Module]) -> None:
    assert not fused_rotaries(nn.Sequential(cls()))


def operands(dtype: torch.dtype = torch.bfloat16, tokens: int = 5) -> tuple[Tensor, ...]:
    q, k = (torch.randn(2, tokens, heads, 16).to(dtype).transpose(1, 2) for heads in (4, 2))
    return q, k, torch.randn(2, tokens, 16).to(dtype), torch.randn(2, tokens, 16).to(dtype)


@WITH_KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_called_through_decorators_and_super(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fused_rotaries(nn.Sequential(Decorated()))["0"]
    served: list[bool] = []
    rotary = ops.rotary

    def counted(*args: Any) -> Any:
        turned = rotary(*args)
        served.append(turned is not None)
        return turned

    monkeypatch.setattr(ops, "rotary", counted)
    given = operands(dtype)
    with torch.no_grad():
        for twice in (False, True):
            for mine, other in zip(module(*given, twice=twice), Decorated()(*given, twice=twice), strict=True):
                assert torch.equal(mine, other)
    assert served == [True, True]  # what `super()` calls is another class's
    module(*given)
    assert served == [True, True, False], "a gradient may be wanted"


def test_gradients_are_those_of_the_function() -> None:
    module, given = fused_rotaries(nn.Sequential(Plain()))["0"], operands(torch.float32)
    found = []
    for one in (module, Plain()):
        leaves = [operand.clone().requires_grad_() for operand in given]
        y, z = one(*leaves)
        found.append(torch.autograd.grad(y.square().sum() + z.sum(), leaves))
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


def test_a_module_with_a_forward_of_its_own_is_left() -> None:
    module = Plain()
    module.forward = lambda *args: args  # type: ignore[method-assign]
    assert not fused_rotaries(nn.Sequential(module))


# -- models ----------------------------------------------------------------------------------------------------------


def quantized(model: Any, **options: Any) -> Any:
    octavo.quantize(model, "w8a16", **options)
    return model


def attentions(model: nn.Module) -> list[FusedRotary]:
    return [module for module in model.modules() if isinstance(module, FusedRotary)]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        y: Tensor = model(ids).logits
        return y


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("make", [llama, qwen3_moe])
def test_a_model_gives_the_same_bits(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(make().to(torch.bfloat16))
    assert len(attentions(model)) == model.config.num_hidden_layers
    y = logits(model, IDS)
    monkeypatch.setattr(ops, "rotary", lambda *operands: None)
    assert torch.equal(logits(model, IDS), y)


def test_copies_compute_the_same() -> None:
    model = quantized(llama())
    y = logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(attentions(other)) == len(attentions(model)) and torch.equal(logits(other, IDS), y)
        assert attentions(other)[0] is not attentions(model)[0]


def test_ignored_attentions_stay_as_they_are() -> None:
    model = quantized(llama(), ignore=["re:.*layers.0.self_attn"])
    assert len(attentions(model)) == model.config.num_hidden_layers - 1


def test_the_class_of_other_models_is_not_touched() -> None:
    before = vars(class_of("llama.LlamaAttention"))["forward"]
    other = llama()
    quantized(llama())
    assert vars(class_of("llama.LlamaAttention"))["forward"] is before and not attentions(other)


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "eager_attention_forward", "LlamaAttention.forward"])
def test_what_was_patched_since_another_model_was_quantized_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    octavo.quantize(llama(attn_implementation="eager"), "w8a16")
    asked: list[int] = []
    holder: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    own = getattr(holder, last)
    monkeypatch.setattr(holder, last, lambda *args, **kwargs: asked.append(1) or own(*args, **kwargs))
    model = llama(attn_implementation="eager")
    octavo.quantize(model, "w8a16")
    model(torch.arange(4)[None])
    assert len(asked) == 2


def test_a_compiler_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(llama())
    y = logits(model, IDS)
    monkeypatch.setattr(eager, "_rotary", None)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, IDS), y)


@torch.no_grad()
def test_operands_that_do_not_go_together_are_left_to_torch() -> None:
    q, k, cos, sin = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 3, 8), torch.randn(1, 3, 8)
    assert (ops.rotary(q, k, cos, sin) is None) == (dispatch.native_kernels.isa is None)
    odd = tuple(x[..., :7].contiguous() for x in (q, k, cos, sin))
    for wrong in (
        odd, (q, k.bfloat16(), cos, sin), (q, k, cos.double(), sin), (q, k, cos, sin.to("meta")), (q, k[:1], cos, sin),
        (q, k[:, :, :2], cos, sin), (q, k, cos[:, :2], sin), (q, k, cos, torch.cat([cos, sin])), (q, k, cos[0], sin[0]),
    ):  # fmt: skip
        assert ops.rotary(*wrong) is None
