"""gpt-fast's checkpoints, against gpt-fast's own formula written out here."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import octavo
from octavo import CheckpointError, QuantizeError
from octavo.integrations import gpt_fast
from tests.tiny_models import build, llama, tokens


def dynamically_quantize_per_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantize.py of gpt-fast, with quant_min=-128, quant_max=127, target_dtype=torch.int8: the codes and scales."""
    eps = torch.finfo(torch.float32).eps
    min_val, max_val = torch.aminmax(x, dim=1)
    min_val_neg = torch.min(min_val, torch.zeros_like(min_val))
    max_val_pos = torch.max(max_val, torch.zeros_like(max_val))
    max_val_pos = torch.max(-min_val_neg, max_val_pos)
    scales = max_val_pos / (float(127 - -128) / 2)
    scales = torch.clamp(scales, min=eps).to(x.dtype)
    x_div = x / scales.unsqueeze(-1)
    return torch.clamp(torch.round(x_div), -128, 127).to(torch.int8), scales


def reference_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """WeightOnlyInt8QuantHandler.create_quantized_state_dict, which quantizes `mod.weight.float()`."""
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            codes, scales = dynamically_quantize_per_channel(module.weight.detach().float())
            tensors[f"{name}.weight"], tensors[f"{name}.scales"] = codes, scales.to(module.weight.dtype)
    return tensors


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.wqkv = nn.Linear(6, 9)
        self.wo = nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.output = nn.Linear(6, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(self.wo(self.wqkv(self.embedding(x)))))


def on_meta() -> Block:
    with torch.device("meta"):
        return Block()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_dict_is_gpt_fasts_bit_for_bit(dtype: torch.dtype) -> None:
    model = Block().to(dtype)
    with torch.no_grad():
        model.wqkv.weight[3] = 0
        model.wo.weight[2] = 1e-7
        model.wo.weight[4, 1] = -100
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = gpt_fast.state_dict(model)
    assert_same(ours, reference_state_dict(model))
    assert ours["wqkv.scales"].dtype == dtype
    assert int(ours["wo.weight"].min()) == -128
    assert_same(dict(model.state_dict()), before)


@given(
    n=st.integers(1, 5),
    k=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    log_size=st.integers(-30, 4),
    seed=st.integers(0, 2**16),
)
def test_any_weight_has_gpt_fasts_codes(n: int, k: int, dtype: torch.dtype, log_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(k, n))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(n, k) * 2.0**log_size)
    model.to(dtype)
    assert_same(gpt_fast.state_dict(model), reference_state_dict(model))


@pytest.mark.parametrize("meta", [False, True], ids=["built", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_of_gpt_fast_runs(tmp_path: Path, dtype: torch.dtype, meta: bool) -> None:
    """As WeightOnlyInt8Linear.forward: F.linear(x, weight.to(x.dtype)) * scales, here in float64."""
    model = Block().to(dtype)
    theirs = reference_state_dict(model)
    torch.save(theirs, tmp_path / "model_int8.pth")
    target = on_meta() if meta else Block()
    loaded = gpt_fast.load(tmp_path / "model_int8.pth", target)
    assert loaded is target
    x = torch.randn(4, 6).to(dtype)
    expected = x.double() @ theirs["wqkv.weight"].double().T * theirs["wqkv.scales"].double()
    expected += theirs["wqkv.bias"].double()
    eps = torch.finfo(dtype).eps
    assert torch.allclose(loaded.wqkv(x).double(), expected, rtol=4 * eps, atol=4 * eps)
    assert loaded.wqkv(x).dtype == dtype
    loaded(torch.arange(5))  # all of it
    assert_same(gpt_fast.state_dict(loaded), theirs)  # and back, with the biases


@pytest.mark.parametrize("scheme", ["w8a8", "o1"])
def test_int8_inputs_are_not_silently_lost(scheme: str) -> None:
    model = Block()
    octavo.quantize(model, scheme)
    with pytest.raises(QuantizeError, match=rf"\({scheme}\); gpt-fast has .* float inputs only: .* as 'w8a16'"):
        gpt_fast.state_dict(model)


def test_a_model_quantized_by_octavo_is_written_with_its_own_codes(tmp_path: Path) -> None:
    model = Block().to(torch.bfloat16)
    octavo.quantize(model, "w8a16")
    gpt_fast.save(model, tmp_path / "model_int8.pth")
    written = torch.load(tmp_path / "model_int8.pth", weights_only=True)
    assert torch.equal(written["wo.weight"], model.wo.weight)
    assert written["wo.scales"].dtype == torch.bfloat16
    assert torch.equal(written["wo.scales"].float(), model.wo.weight_scale[:, 0])
    loaded = gpt_fast.load(tmp_path / "model_int8.pth", Block())
    x = torch.arange(5)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_of_a_wrapped_model_the_model_is_written(wrap: Any) -> None:
    model = Block()
    assert_same(gpt_fast.state_dict(wrap(model)), reference_state_dict(model))


def test_a_file_that_cannot_be_mapped_is_read(tmp_path: Path) -> None:
    """As torch wrote it before 1.6."""
    tensors = reference_state_dict(Block())
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(gpt_fast.read(tmp_path / "old.pth"), tensors)


def test_a_whole_model_stays_close_to_the_float_one(tmp_path: Path) -> None:
    model = build(llama, torch.bfloat16)
    file = gpt_fast.save(model, tmp_path / "model_int8.pth")
    loaded = gpt_fast.load(file, build(llama))
    ids = tokens()
    with torch.no_grad():
        ours, float_ = loaded(ids).logits.float(), model(ids).logits.float()
    assert (ours - float_).norm() / float_.norm() < 0.02


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_loaded_is_saved_by_transformers_as_int8(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    file = gpt_fast.save(build(llama, dtype, tie_word_embeddings=tied), tmp_path / "model_int8.pth")
    loaded = gpt_fast.load(file, build(llama, dtype, tie_word_embeddings=tied))
    loaded.save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved")
    assert_same(gpt_fast.state_dict(again), torch.load(file, weights_only=True))


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model_int8.pth"
    gpt_fast.save(Block(), file)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"model_int8\.pth: already exists"):
        gpt_fast.save(Block(), file)
    assert file.read_bytes() == before

    def fill_the_disk(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(CheckpointError, match="the disk is full"):
        gpt_fast.save(Block(), tmp_path / "other.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["model_int8.pth"]


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.zeros(1), "evil": Malicious()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=rf"{name}: is not a state dict that can be read safely"):
            gpt_fast.load(tmp_path / name, Block())
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", "is not a state dict that can be read safely"),
        (b"", "is not a state dict that can be read safely"),
        (None, "is not a state dict that can be read safely"),
        ([torch.zeros(1)], "holds something else"),
        ({"a": 1}, "holds something else"),
        ({5: torch.zeros(1)}, "holds something else"),
        (
            {"a.weight": torch.zeros(1)},
            r"has no <name>\.scales; expected gpt-fast's int8 checkpoint, this one is float",
        ),
    ],
    ids=["garbage", "empty", "missing", "list", "numbers", "unnamed", "float"],
)
def test_what_is_no_int8_checkpoint_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "file.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"file\.pth: {message}"):
        gpt_fast.read(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wo.weight": torch.zeros(6, 8, dtype=torch.int8)}, r"wo has a weight of torch\.int8 \[6, 8\].*\[6, 9\]"),
        ({"wo.weight": torch.zeros(6, 9)}, r"wo has a weight of torch\.float32"),
        ({"wo.scales": torch.zeros(5)}, r"scales \[5\], expected"),
        ({"wo.scales": torch.full((6,), torch.nan)}, r"wo\.scales is .* holds NaN or inf, expected finite"),
        ({"wo.scales": torch.ones(6, dtype=torch.int8)}, r"wo\.scales is torch\.int8 .*, expected .* floating point"),
        ({"wo.scales": torch.ones(6).to(torch.float8_e5m2)}, r"wo\.scales is torch\.float8_e5m2 .* 16 bits or more"),
        ({"norm.bias": torch.zeros(6, dtype=torch.int8)}, r"'norm\.bias' is torch\.int8 .* and torch\.float32 in the"),
        ({"norm.scales": torch.zeros(6)}, r"'norm', which is no plain linear layer"),
        ({"gone.scales": torch.zeros(6), "gone.weight": torch.zeros(6, 9, dtype=torch.int8)}, r"'gone', which is no"),
        ({"lonely.scales": torch.zeros(6)}, r"'lonely\.scales' is \[6\] in the file and missing in the model"),
        ({"norm.bias": torch.zeros(4)}, r"'norm\.bias' is \[4\] in the file and \[6\] in the model"),
        ({"norm.bias": None}, r"'norm\.bias' is missing in the file and \[6\] in the model"),
        ({"wqkv.bias": None}, r"'wqkv\.bias' is missing in the file and \[9\] in the model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    tensors = {**reference_state_dict(Block()), **changes}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "file.pth")
    model = Block()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"file\.pth.*{message}"):
        gpt_fast.load(tmp_path / "file.pth", model)
    assert type(model.wo) is nn.Linear
    assert_same(dict(model.state_dict()), before)


def test_a_buffer_that_is_nowhere_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    gpt_fast.save(Block(), tmp_path / "file.pth")
    model = on_meta()
    model.norm.register_buffer("table", torch.ones(6, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"file\.pth: does not hold norm\.table \(1 such: buffers that are not"):
        gpt_fast.load(tmp_path / "file.pth", model)
    assert type(model.wo) is nn.Linear


def test_layers_that_gpt_fast_does_not_have_are_refused() -> None:
    model = Block()
    octavo.quantize(model, "w8a16", group_size=3)
    with pytest.raises(QuantizeError, match=r"wqkv: is an int8 Linear \(w8a16 g3\); gpt-fast has int8 linear layers"):
        gpt_fast.state_dict(model)
    model = nn.Sequential(nn.Conv1d(3, 3, 1))
    octavo.quantize(model, "w8a16")
    with pytest.raises(QuantizeError, match=r"0: is an int8 Conv1d"):
        gpt_fast.state_dict(model)


def test_a_head_tied_to_the_embedding_is_written_beside_it(tmp_path: Path) -> None:
    """gpt-fast quantizes every linear layer, and keeps the embedding float: the file holds both."""
    model = build(llama, torch.bfloat16, tie_word_embeddings=True)
    tensors = gpt_fast.state_dict(model)
    assert tensors["lm_head.weight"].dtype == torch.int8
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    torch.save(tensors, tmp_path / "file.pth")
    loaded = gpt_fast.load(tmp_path / "file.pth", build(llama, tie_word_embeddings=True))
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    ids = tokens()
    with torch.no_grad():
        error = (loaded(ids).logits - model(ids).logits).float().norm() / model(ids).logits.float().norm()
    assert error < 0.02


# -- its Mixtral ------------------------------------------------------------------------------------------------------


class ConditionalFeedForward(nn.Module):
    """gpt-fast's mixtral-moe/model.py."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.randn(4, *shape)) for shape in ((6, 8), (8, 6), (6, 8)))

    def forward(self, x: Tensor, expert_indices: Tensor) -> Tensor:
        x1 = nn.functional.silu(torch.einsum("ti,taoi -> tao", x, self.w1[expert_indices]))
        x3 = torch.einsum("ti, taoi -> tao", x, self.w3[expert_indices])
        return torch.einsum("tao, taio -> tai", (x1 * x3), self.w2[expert_indices])


class MOEFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.cond_ffn = ConditionalFeedForward()
        self.wo = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.gate(x).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.wo(torch.einsum("tai,ta -> ti", self.cond_ffn(x, indices), weights))


def mixtral_state_dict(model: MOEFeedForward) -> dict[str, Tensor]:
    """create_quantized_state_dict of mixtral-moe/quantize.py: routers are left out, scales of experts are fp32."""
    tensors = dict(model.state_dict())
    codes, scales = dynamically_quantize_per_channel(model.wo.weight.detach().float())
    tensors["wo.weight"], tensors["wo.scales"] = codes, scales.to(model.wo.weight.dtype)
    for i in (1, 2, 3):
        stack = getattr(model.cond_ffn, f"w{i}").detach()
        pairs = [dynamically_quantize_per_channel(one.float()) for one in stack]
        tensors[f"cond_ffn.w{i}"] = torch.stack([codes for codes, _ in pairs])
        tensors[f"cond_ffn.scales{i}"] = torch.stack([scales for _, scales in pairs])
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral_is_written_bit_for_bit_and_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = MOEFeedForward().to(dtype)
    theirs, ours = mixtral_state_dict(model), gpt_fast.state_dict(model)
    assert theirs.keys() == ours.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    torch.save(theirs, tmp_path / "model_int8.pth")
    with torch.device("meta"):
        empty = MOEFeedForward().to(dtype)
    loaded = gpt_fast.load(tmp_path / "model_int8.pth", empty)
    truth = MOEFeedForward().double()
    with torch.no_grad():
        truth.gate.weight.copy_(model.gate.weight)
        truth.wo.weight.copy_(theirs["wo.weight"].double() * theirs["wo.scales"].double().unsqueeze(1))
        for i in (1, 2, 3):
            dequantized = theirs[f"cond_ffn.w{i}"].double() * theirs[f"cond_ffn.scales{i}"].double().unsqueeze(-1)
            getattr(truth.cond_ffn, f"w{i}").copy_(dequantized)
    x = torch.randn(5, 8).to(dtype)
    error = (loaded(x).double() - truth(x.double())).norm() / truth(x.double()).norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)
    again = gpt_fast.state_dict(loaded)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_damaged_experts_are_named(tmp_path: Path) -> None:
    tensors = mixtral_state_dict(MOEFeedForward())
    tensors["cond_ffn.scales2"] = tensors["cond_ffn.scales2"][:, :3]
    torch.save(tensors, tmp_path / "model_int8.pth")
    with pytest.raises(CheckpointError, match=r"cond_ffn.w2 is \[4, 8, 6\] with scales2 \[4, 3\], expected int8"):
        gpt_fast.load(tmp_path / "model_int8.pth", MOEFeedForward())
