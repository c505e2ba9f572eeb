"""Float attention of a model next to float64 and to transformers' "sdpa", whose place it takes in quantized models."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo import ops
from octavo.ops import dispatch
from tests.ops.test_attention import exact
from tests.tiny_models import bert, build, falcon, gpt2, llama, mixtral, qwen2, t5, tokens, whisper

transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from octavo.integrations import float_attention  # noqa: E402
from octavo.integrations.attention import attention_of  # noqa: E402
from octavo.integrations.float_attention import NAME, float_attention_forward, use_float_attention  # noqa: E402

needs_kernel = pytest.mark.skipif(
    not any(dispatch.native_kernels.attends_in.values()), reason="this processor has no kernel of octavo's"
)

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""What rounding to this type changes a number by at most, as a share of it."""


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package has no kernel for float attention."""
    monkeypatch.setattr(dispatch, "native_kernels", dataclasses.replace(dispatch.native_kernels, attends_in={}))


def operands(
    batch: int, heads: int, key_heads: int, tokens: int, size: int, dtype: torch.dtype, value: int | None = None,
    queries: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query = torch.randn(batch, heads, queries, size).to(dtype)
    key = torch.randn(batch, key_heads, tokens, size).to(dtype)
    return query, key, torch.randn(batch, key_heads, tokens, value or size).to(dtype)


def in_float64(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """[B, T, H, Dv], as transformers has it."""
    return exact(query, key, value, mask, scaling).transpose(1, 2)


def asked_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call had that was passed on."""
    passed_on: list[int] = []

    def spy(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        passed_on.append(query.shape[2])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr(float_attention, "sdpa_attention_forward", spy)
    return passed_on


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "key_heads"), [(1, 2), (2, 6), (40, 3), (40, 6)])
@pytest.mark.parametrize("how", ["everything", "causal", "as the module says", "mask"])
def test_the_kernel_answers_what_sdpa_would(
    how: str, queries: int, key_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_on = asked_of_sdpa(monkeypatch)
    query, key, value = operands(2, 6, key_heads, 60, 24, dtype, 16, queries)
    module, mask, kwargs, allowed = nn.Module(), None, {}, None
    module.num_key_value_groups = 6 // key_heads
    if how == "mask":
        mask = allowed = (torch.rand(2, 1, queries, 60) < 0.6) | (torch.arange(60) == 7)
    elif how == "everything":
        kwargs = {"is_causal": False}
    elif queries > 1:  # a single query is the last one
        allowed = torch.ones(queries, 60, dtype=torch.bool).tril()
        if how == "causal":
            module.is_causal, kwargs = False, {"is_causal": True}
    with torch.no_grad():
        y, probabilities = float_attention_forward(module, query, key, value, mask, **kwargs)
    assert probabilities is None and y.shape == (2, queries, 6, 16) and y.is_contiguous()
    unit = UNIT.get(dtype, 2.0**-20)
    torch.testing.assert_close(y.double(), in_float64(query, key, value, 24**-0.5, allowed), rtol=unit, atol=2 * unit)
    assert passed_on == ([] if ops.attends_in_float(query, key) else [queries])


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "tokens", "size", "value"),
    [(1, 8, 2, 1, 16, None), (1, 6, 6, 77, 8, None), (3, 9, 3, 33, 5, 7), (2, 4, 1, 300, 64, None)],
)
def test_one_query_is_that_of_float64(
    batch: int, heads: int, key_heads: int, tokens: int, size: int, value: int | None, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    passed_on = asked_of_sdpa(monkeypatch)
    query, key, value_ = operands(batch, heads, key_heads, tokens, size, dtype, value)
    for scaling in (None, 0.7):
        y, probabilities = float_attention_forward(nn.Module(), query, key, value_, None, scaling=scaling)
        expected = in_float64(query, key, value_, scaling or size**-0.5)
        assert y.dtype == dtype and probabilities is None and not passed_on
        assert (y.double() - expected).abs().max() <= UNIT[dtype] * expected.abs().max() + 1e-5


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
def test_any_strides(kernel: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if not kernel:
        request.getfixturevalue("composed")
    passed_on = asked_of_sdpa(monkeypatch)
    query = torch.randn(8, 1, 2, 6).half().permute(2, 3, 1, 0)  # [2, 6, 1, 8], its values far apart
    key = torch.randn(2, 40, 3, 16).half()[..., ::2].transpose(1, 2)
    value = torch.randn(3, 2, 8, 40).half().permute(1, 0, 3, 2)
    y, _ = float_attention_forward(nn.Module(), query, key, value, None)
    torch.testing.assert_close(y.double(), in_float64(query, key, value, 8**-0.5), rtol=2.0**-11, atol=1e-5)
    assert not passed_on


@pytest.mark.usefixtures("composed")
def test_key_heads_are_taken_so_many_at_a_time_that_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands(2, 10, 5, 40, 8, torch.bfloat16)
    whole, _ = float_attention_forward(nn.Module(), query, key, value, None)
    passed_on = asked_of_sdpa(monkeypatch)
    monkeypatch.setattr(float_attention, "AT_ONCE", 2 * 2 * 40 * 8)  # two of five heads
    some, _ = float_attention_forward(nn.Module(), query, key, value, None)
    torch.testing.assert_close(some, whole, rtol=0, atol=2.0**-8)
    assert not passed_on
    monkeypatch.setattr(float_attention, "MOST", 2 * 40 * 8 - 1)
    module = nn.Module()
    module.num_key_value_groups = 2
    float_attention_forward(module, query, key, value, None)
    assert passed_on == [1]


@needs_kernel
@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.10 tells all that it compiles that it is exported")
@pytest.mark.parametrize("masked", [True, False])
def test_a_compiled_graph_asks_the_kernel(masked: bool) -> None:
    query, key, value = operands(2, 6, 6, 9, 8, torch.bfloat16, queries=9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().view(1, 1, 9, 9) if masked else None
    module, graphs = nn.Module(), []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return float_attention_forward(module, query, key, value, mask)[0]

    def keep(traced: Any, inputs: Any) -> Any:
        graphs.append([node.target for node in traced.graph.nodes if node.op == "call_function"])
        return traced.forward

    ours, torchs = torch.ops.octavo.float_attention.default, torch._C._nn.scaled_dot_product_attention
    compiled = torch.compile(attend, backend=keep, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(query, key, value), attend(query, key, value))
    assert ours in graphs[0] and torchs not in graphs[0]
    compiled(query.requires_grad_(), key, value).sum().backward()
    assert query.grad is not None and ours not in graphs[1] and torchs in graphs[1]


@needs_kernel
def test_an_exported_model_has_torchs_attention() -> None:
    model = build(llama, dtype=torch.bfloat16).eval()
    octavo.quantize(model, "w8a16")
    with torch.no_grad():
        exported = torch.export.export(model, (tokens(1, 9),), {"use_cache": False}, strict=False)
    called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.scaled_dot_product_attention.default in called
    assert torch.ops.octavo.float_attention.default not in called


EXTRAS = ["dropout", "position_bias", "learned queries", "gradient", "a mask that is added", "other dtypes"]


@pytest.mark.parametrize("case", EXTRAS)
def test_extras_are_what_sdpa_makes_of_them(case: str) -> None:
    check_it_is_sdpa_s(case)


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("case", ["mask", "queries", "fp32"])
def test_all_but_single_queries_is_sdpa_s_without_the_kernel(case: str) -> None:
    check_it_is_sdpa_s(case)


def check_it_is_sdpa_s(case: str) -> None:
    query, key, value = operands(2, 4, 4, 9, 8, torch.float32 if case == "fp32" else torch.bfloat16)
    mask, kwargs = None, {}
    if case == "mask":
        mask = torch.rand(2, 1, 1, 9) > 0.3
    elif case == "queries":
        query = torch.randn(2, 4, 9, 8).bfloat16()
    elif case == "dropout":
        kwargs = {"dropout": 0.5}
    elif case == "position_bias":
        kwargs = {"position_bias": torch.randn(1, 4, 1, 9).bfloat16()}
    elif case == "learned queries":
        query = query[:1]
    elif case == "gradient":
        query.requires_grad_()
    elif case == "a mask that is added":
        mask = torch.randn(2, 1, 1, 9).bfloat16()
    elif case == "other dtypes":
        key = key.float()
    results = []
    for attend in (float_attention_forward, sdpa_attention_forward):
        torch.manual_seed(1)
        with torch.autocast("cpu") if case == "other dtypes" else contextlib.nullcontext():
            results.append(attend(nn.Module(), query, key, value, mask, **kwargs)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("make", [llama, qwen2, mixtral, gpt2])
def test_a_quantized_model_decodes_as_with_sdpa(
    make: Callable[..., Any], kernel: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not kernel:
        request.getfixturevalue("composed")
    passed_on = asked_of_sdpa(monkeypatch)
    model = build(make, torch.float16)
    octavo.quantize(model, "w8a16")
    assert model.config._attn_implementation == NAME and attention_of(model) == "float"
    found = decoded(model)
    assert passed_on == ([] if kernel else [8] * model.config.num_hidden_layers), "of the tokens, none by sdpa"
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, decoded(model), rtol=1e-2, atol=2e-3)


def decoded(model: Any) -> Tensor:
    """The logits of two tokens behind a prompt of eight: which the second is asked of depends on the prompt alone."""
    torch.manual_seed(0)
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(tokens(2, 8), pad_token_id=0, **options).logits)


@needs_kernel
def test_padded_batches_are_what_each_sequence_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    passed_on = asked_of_sdpa(monkeypatch)
    model = build(llama, torch.float16)
    octavo.quantize(model, "w8a16")
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    both = torch.stack(model.generate(ids, attention_mask=mask, **options).logits)
    alone = torch.stack(model.generate(ids[:1, 3:], **options).logits)
    torch.testing.assert_close(both[0, :1], alone[0], rtol=1e-2, atol=2e-3)
    assert not passed_on


@pytest.mark.usefixtures("composed")
def test_padded_batches_are_sdpa_s_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(llama, torch.bfloat16)
    octavo.quantize(model, "w8a16")
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    passed_on = asked_of_sdpa(monkeypatch)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert passed_on.count(1) == 3 * model.config.num_hidden_layers
    model.set_attn_implementation("sdpa")
    assert torch.equal(
        found, model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    )


def test_models_that_ask_for_the_name_or_have_another_are_left_alone() -> None:
    asks = build(falcon)
    octavo.quantize(asks, "w8a16")
    assert asks.config._attn_implementation == "sdpa"
    eager = build(llama)
    eager.set_attn_implementation("eager")
    octavo.quantize(eager, "w8a16")
    assert eager.config._attn_implementation == "eager"
    int8 = build(llama)
    octavo.quantize(int8, "w8a16", attention="int8")
    assert attention_of(int8) == "int8"
    alone = nn.Sequential(nn.Linear(4, 4))
    use_float_attention(alone)


@pytest.mark.parametrize("make", [bert, t5, whisper])
def test_every_part_is_switched(make: Callable[..., Any]) -> None:
    model = build(make)
    octavo.quantize(model, "w8a16")
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    assert {part.config._attn_implementation for part in parts} == {NAME}


def test_of_configs_without_a_model_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """CLIP's classifier has the config of a text model, and no text model."""
    small = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**small, "vocab_size": 96}, vision_config=vision, projection_dim=32)
    model = transformers.CLIPForImageClassification(config)
    transformers.logging.enable_propagation()
    use_float_attention(model)
    assert model.vision_model.config._attn_implementation == NAME
    assert not [record for record in caplog.records if "attention implementation" in record.message]


def test_files_do_not_know_of_it_and_loading_switches_anew(tmp_path: Path) -> None:
    model = build(llama)
    octavo.quantize(model, "w8a16")
    octavo.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    for folder in ("saved", "pretrained"):
        assert NAME not in (tmp_path / folder / "config.json").read_text()
    loaded = octavo.load(tmp_path / "saved")
    assert loaded.config._attn_implementation == NAME
    into = octavo.load(tmp_path / "saved", model=build(llama))
    assert into.config._attn_implementation == NAME
    assert torch.equal(decoded(loaded), decoded(model))
