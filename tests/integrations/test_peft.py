"""LoRA adapters of PEFT on int8 layers, next to the formula, and to the sum that is quantized when they are merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification

import octavo
from octavo.errors import OctavoError, QuantizeError
from octavo.modules import QuantLinear
from octavo.primitives import dequantize, quantize_weight
from tests.tiny_models import gpt2, llama, tied_llama

peft = pytest.importorskip("peft")

from octavo.integrations.peft import Int8LoraLinear, on_int8  # noqa: E402  # after the skip

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it

SCHEMES = ["w8a16", "w8a8"]
IDS = torch.arange(24).view(2, 12)


def adapted(model: Any, **config: Any) -> Any:
    """`model` with adapters that change something."""
    made = on_int8(peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}), model)
    found = peft.get_peft_model(model, made)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return found.eval()


def int8_llama(scheme: str = "w8a16", **recipe: Any) -> Any:
    model = llama()
    octavo.quantize(model, scheme, **recipe)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS).logits
        return y


def adapters(model: nn.Module) -> list[Int8LoraLinear]:
    return [module for module in model.modules() if isinstance(module, Int8LoraLinear)]


@pytest.mark.filterwarnings("error:Unsupported layer type")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_linear_is_all_layers_but_the_head(scheme: str) -> None:
    model = int8_llama(scheme, include=["lm_head"])
    count = sum(isinstance(module, QuantLinear) for module in model.modules())
    found = adapters(adapted(model))
    assert len(found) == count - 1 and all(adapter.base_layer is not model.lm_head for adapter in found)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_formula(scheme: str) -> None:
    adapter = adapters(adapted(int8_llama(scheme), lora_alpha=3))[0]
    x = torch.randn(3, adapter.in_features)
    a, b = (part["default"].weight.double() for part in (adapter.lora_A, adapter.lora_B))
    with torch.no_grad():
        expected = adapter.base_layer(x).double() + F.linear(F.linear(x.double(), a), b) * (3 / 4)
        torch.testing.assert_close(adapter(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_changes_adapters_only_and_as_on_the_float_model(scheme: str) -> None:
    model = int8_llama(scheme)
    before = copy.deepcopy(model.state_dict())
    found, losses = trained(model)
    base = found.unload().state_dict()
    assert base.keys() == before.keys() and all(torch.equal(base[name], value) for name, value in before.items())
    assert losses[-1] < losses[0] - 0.3
    torch.testing.assert_close(losses, trained(llama())[1], rtol=0.02, atol=0)


def trained(model: Any) -> tuple[Any, Tensor]:
    """`model` with adapters, the same for every model, and the loss of each step."""
    torch.manual_seed(0)
    found = adapted(model).train()
    assert all("lora_" in name for name, parameter in found.named_parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW([each for each in found.parameters() if each.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = found(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return found, torch.stack(losses)


@pytest.mark.parametrize("recipe", [{}, {"group_size": 2}], ids=["per channel", "per group"])
def test_merged_codes_are_those_of_the_sum(recipe: Any) -> None:
    found = adapted(int8_llama(**recipe))
    adapter, before = adapters(found)[0], logits(found)
    codes, scale = (part.clone() for part in adapter.base_layer.codes_and_scale())
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    with torch.no_grad():
        expected = quantize_weight(
            dequantize(codes, scale) + b @ a * adapter.scaling["default"],
            *(("per_group",) if recipe else ()), group_size=recipe.get("group_size"),
        )  # fmt: skip
    found.merge_adapter()
    assert all(map(torch.equal, adapter.base_layer.codes_and_scale(), expected))
    merged = logits(found)
    assert not torch.equal(merged, before)
    torch.testing.assert_close(merged, before, rtol=0.1, atol=0.1 * before.std().item())
    found.unmerge_adapter()
    assert all(map(torch.equal, adapter.base_layer.codes_and_scale(), (codes, scale)))
    assert torch.equal(logits(found), before)


def test_merge_and_unload_gives_an_int8_model(tmp_path: Path) -> None:
    found = adapted(int8_llama())
    other = copy.deepcopy(found)
    other.merge_adapter()
    merged, model = logits(other), found.merge_and_unload()
    assert not adapters(model) and torch.equal(logits(model), merged)
    octavo.save(model, tmp_path / "out")
    torch.testing.assert_close(logits(octavo.load(tmp_path / "out")), merged)


def test_a_model_with_adapters_on_it_is_not_saved_as_one_without(tmp_path: Path) -> None:
    model = adapted(int8_llama())
    for each in (model, model.get_base_model()):
        with pytest.raises(QuantizeError, match=r"q_proj: has adapters of PEFT on it.*merge_and_unload"):
            octavo.save(each, tmp_path / "out")
    with pytest.raises(QuantizeError, match=r"q_proj: has adapters of PEFT on it.*merge_and_unload"):
        model.get_base_model().save_pretrained(tmp_path / "pretrained")
    octavo.save(model.unload(), tmp_path / "out")
    octavo.load(tmp_path / "out")


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model = int8_llama()
    found = adapted(copy.deepcopy(model))
    found.save_pretrained(tmp_path)
    config = on_int8(peft.LoraConfig.from_pretrained(tmp_path), model)
    again = peft.PeftModel.from_pretrained(model, tmp_path, config=config).eval()
    assert adapters(again) and torch.equal(logits(again), logits(found))


def test_layers_that_were_turned_around() -> None:
    model = gpt2()
    octavo.quantize(model, "w8a16")
    found = adapted(model, fan_in_fan_out=True)
    before = logits(found)
    found.merge_adapter()
    torch.testing.assert_close(logits(found), before, rtol=0.1, atol=0.1 * before.std().item())


READERS = [
    {"init_lora_weights": "pissa"}, {"use_dora": True}, {"lora_bias": True},
    {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
]  # fmt: skip


@pytest.mark.parametrize("config", READERS, ids=lambda config: next(iter(config)))
def test_what_reads_a_float_weight_is_refused(config: Any) -> None:
    with pytest.raises(OctavoError, match=f"{next(iter(config))} is"):
        adapted(int8_llama(), **config)


TRAINED = [
    {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["model"]}, {"trainable_token_indices": [3]},
    {"trainable_token_indices": {"embed_tokens": [3]}}, {"target_parameters": ["up_proj.weight"]},
]  # fmt: skip


@pytest.mark.parametrize("config", TRAINED, ids=str)
def test_int8_layers_that_would_be_trained_as_a_whole_are_refused(config: Any) -> None:
    model = int8_llama(include=["lm_head", "Embedding"])
    with pytest.raises(OctavoError, match=f"{next(iter(config))}: has PEFT train int8 layers.*keep them float"):
        adapted(model, **config)


def test_float_layers_are_trained_as_a_whole() -> None:
    found = adapted(int8_llama(ignore=["re:.*layers.0"]), modules_to_save=["lm_head", "layers.0"])
    assert found.base_model.model.lm_head.modules_to_save["default"].weight.requires_grad


def test_a_classifier_is_trained_as_a_whole_if_it_is_float() -> None:
    def classifier(**options: Any) -> Any:
        shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
        model = RobertaForSequenceClassification(RobertaConfig(**shape, num_hidden_layers=1, num_labels=3))
        octavo.quantize(model, "w8a16", **options)
        return model

    with pytest.raises(OctavoError, match=r"SEQ_CLS: .* ignore=\['classifier.dense', 'classifier.out_proj'\]"):
        adapted(classifier(), task_type="SEQ_CLS")
    found = adapted(classifier(ignore=["re:classifier"]), task_type="SEQ_CLS")
    trained = {name for name, parameter in found.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert {name.rsplit("default.")[-1] for name in trained} == {
        f"{layer}.{name}" for layer in ("dense", "out_proj") for name in ("weight", "bias")
    }


@pytest.mark.parametrize("kind", [peft.IA3Config, peft.AdaLoraConfig])
def test_other_adapters_are_refused(kind: Any) -> None:
    with pytest.raises(OctavoError, match=f"is a {kind.__name__}.*LoraConfig"):
        on_int8(kind() if kind is peft.IA3Config else kind(total_step=3), int8_llama())


def test_all_linear_is_said_in_any_case() -> None:
    assert adapters(adapted(int8_llama(), target_modules="All-Linear"))


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning")  # PEFT's, of merging in general
def test_an_adapter_on_a_shared_head_is_not_merged() -> None:
    model = tied_llama()
    octavo.quantize(model, "w8a16", include=["Embedding", "lm_head"])
    found = adapted(model, target_modules=["lm_head"])
    table = model.model.embed_tokens.codes_and_scale()[0].clone()
    with pytest.raises(QuantizeError, match="shares its codes with the embedding"):
        found.merge_adapter()
    assert torch.equal(model.model.embed_tokens.codes_and_scale()[0], table)


def test_a_sum_that_is_not_finite_changes_nothing() -> None:
    found = adapted(int8_llama())
    adapter = adapters(found)[0]
    codes = adapter.base_layer.codes_and_scale()[0].clone()
    adapter.lora_B["default"].weight.data.fill_(torch.inf)
    with pytest.raises(QuantizeError, match="base \\+ adapters"):
        adapter.merge()
    assert torch.equal(adapter.base_layer.codes_and_scale()[0], codes) and not adapter.merged
