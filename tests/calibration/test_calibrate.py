"""Statistics of layers' inputs, against inputs that are written down by hooks of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import octavo
from octavo.calibration.calibrate import calibrate
from octavo.calibration.stats import Stats
from octavo.errors import CalibrateError, EvaluateError, QuantizeError


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def recorded(model: nn.Module, batches: list[Any], keep: Any = None) -> dict[str, Tensor]:
    """Every input row of every linear layer, in fp32, by name."""
    rows: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: rows.setdefault(name, []).append(args[0].detach().float().clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in found]) for name, found in rows.items()}


def test_ranges_of_every_layer() -> None:
    model = llama()
    batches = [torch.randint(1, 97, (b, t)) for b, t in ((1, 7), (3, 5), (2, 30))]  # of different lengths
    stats = calibrate(model, batches)
    truth = recorded(model, batches)
    assert set(stats.observers) == set(truth) and stats.unreached == ()
    for name, x in truth.items():
        seen = stats.observers[name]
        assert torch.equal(seen.amax, x.abs().amax(0))
        assert seen.tokens == len(x) == 7 + 15 + 60
        assert int(seen.histogram.sum()) == x.numel()
        assert all((row == x).all(1).any() for row in seen.rows.float())


def test_who_shares_an_input_is_seen() -> None:
    stats = calibrate(llama(), [torch.randint(1, 97, (2, 9)) for _ in range(2)])
    groups = {tuple(name.removeprefix("model.layers.") for name in group) for group in stats.shared}
    assert groups == {
        (f"{i}.{block}.{a}_proj", *(f"{i}.{block}.{b}_proj" for b in rest))
        for i in (0, 1)
        for block, a, rest in (("self_attn", "q", "kv"), ("mlp", "gate", ("up",)))
    }


def test_padding_does_not_count() -> None:
    """The same prompts alone, and padded on either side in one batch."""
    model = llama()
    prompts = [torch.randint(1, 97, (n,)) for n in (4, 9, 6)]
    alone = calibrate(model, [prompt.unsqueeze(0) for prompt in prompts])
    for left in (False, True):
        ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            at = slice(9 - len(prompt), 9) if left else slice(0, len(prompt))
            ids[row, at], mask[row, at] = prompt, 1
        padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
        for name, seen in alone.observers.items():
            assert padded.observers[name].tokens == seen.tokens == 19
            torch.testing.assert_close(padded.observers[name].amax, seen.amax, rtol=1e-4, atol=1e-5)


def test_torch_s_encoder_has_a_fast_path_that_runs_on_nested_tensors() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    mask = torch.arange(5) >= torch.tensor([[3], [5]])
    stats = calibrate(model, [{"src": torch.randn(2, 5, 8), "src_key_padding_mask": mask}])
    assert stats.observers["layers.0.linear1"].tokens == stats.observers["layers.0.linear2"].tokens == 10


def test_inputs_and_model_are_left_as_they_were() -> None:
    model = llama().train()
    batch = {"input_ids": torch.randint(1, 97, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    before = {name: value.clone() for name, value in batch.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, [batch])
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("bad", "found"), [(torch.nan, "NaN"), (torch.inf, "inf")])
def test_what_is_not_finite_is_an_error_that_names_the_layer(bad: float, found: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].bias[1] = bad
    with pytest.raises(CalibrateError, match=rf"^2: batch 0 holds {found} in its input \(channel 1\)"):
        calibrate(model, [torch.ones(1, 3)])
    assert not any(module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.zero, self.tiny = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.zero(x * 0) + self.tiny(x * 1e-44)


class WithPositions(nn.Module):
    """A model with a table of its own; NaN are values that are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.positions = nn.LayerNorm(4), nn.Linear(4, 4), nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x.nan_to_num() + self.positions))


def test_what_enters_a_block_is_multiplied_by_no_weight_of_it() -> None:
    x = torch.randn(2, 3, 4)
    x[0, 1] = torch.nan
    assert calibrate(WithPositions(), [x]).observers.keys() == {"layer"}


def test_layers_that_no_batch_reached_are_listed_and_get_dynamic_inputs() -> None:
    model = Branches()
    stats = calibrate(model, [torch.randn(6, 4)])
    assert stats.unreached == ("dead",)
    report = octavo.quantize(model, "w8a8-static", stats=stats, repair=False)
    fates = {row.name: (row.scheme, row.reason) for row in report.rows if row.scheme}
    assert fates["used.weight"] == ("w8a8-static", None)
    assert fates["dead.weight"] == ("w8a8", "no batch of the calibration reached it: a dynamic scale")
    assert fates["zero.weight"] == ("w8a8", "its inputs were all 0 in calibration: a dynamic scale")
    assert fates["tiny.weight"] == ("w8a8", "its inputs were too small in calibration: a dynamic scale")
    with pytest.raises(CalibrateError, match="dead: has no static scale, no batch reached it"):
        stats.input_scale("dead", torch.float32)


def test_a_layer_that_ran_without_a_token_was_not_reached() -> None:
    """As experts in a list do that no token was routed to."""
    model = Branches()
    model.used.register_forward_hook(lambda module, args, output: output + model.dead(args[0][:0]).sum())
    stats = calibrate(model, [torch.randn(6, 4), torch.randn(3, 4)])
    assert stats.unreached == ("dead",) and stats.observers["used"].tokens == 9


def test_progress_and_bad_batches() -> None:
    model, steps = nn.Sequential(nn.Linear(3, 3)), []
    calibrate(model, [torch.ones(1, 3)] * 2, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    with pytest.raises(CalibrateError, match="batches is empty"):
        calibrate(model, [])
    with pytest.raises(CalibrateError, match="batches: got 2, of which no token reached a linear layer"):
        calibrate(model, [torch.ones(0, 3), torch.ones(0, 3)])
    for rows in (-1, 2.5, "all"):
        with pytest.raises(CalibrateError, match=f"rows is {rows!r}, expected a number"):
            calibrate(model, [torch.ones(1, 3)], rows=rows)
    with pytest.raises(EvaluateError, match="expected an iterable of batches; for one batch write"):
        calibrate(model, torch.ones(1, 3))
    with pytest.raises(EvaluateError, match="batch 0: the model was to be fed a str"):
        calibrate(model, ["text"])
    with pytest.raises(CalibrateError, match="no linear layer to calibrate"):
        calibrate(nn.Sequential(nn.ReLU()), [torch.ones(1)])


@pytest.mark.parametrize("ignore", [[], ["1"]])
def test_an_int8_model_is_refused(ignore: list[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    octavo.quantize(model, "w8a16", ignore=ignore)
    with pytest.raises(QuantizeError, match="the model holds int8 layers; calibrate the float model"):
        calibrate(model, [torch.ones(1, 3)])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(5, 3))


def test_a_data_loader_that_does_not_know_its_length() -> None:
    model, batches = nn.Linear(3, 3), DataLoader(Stream(), batch_size=2)
    steps: list[tuple[int, int]] = []
    assert calibrate(model, batches, progress=lambda *step: steps.append(step)).observers[""].tokens == 5
    assert steps == [(1, 0), (2, 0), (3, 0)]
    assert octavo.compare(model, model, batches).batches == 3


def test_rows_are_few_whatever_the_tokens() -> None:
    stats = calibrate(nn.Sequential(nn.Linear(3, 3)), [torch.randn(1000, 3) for _ in range(5)], rows=16)
    assert stats.observers["0"].rows.shape == (16, 3)


# -- on disk ---------------------------------------------------------------------------------------------------------


def assert_equal_stats(one: Stats, other: Stats) -> None:
    assert list(one.observers) == list(other.observers)
    assert (one.unreached, one.shared) == (other.unreached, other.shared)
    for mine, theirs in ((one.observers, other.observers), (one.experts, other.experts)):
        assert list(mine) == list(theirs)
        for name, seen in mine.items():
            for field, value in vars(seen).items():
                twin = getattr(theirs[name], field)
                assert torch.equal(value, twin) if isinstance(value, Tensor) else value == twin


def test_two_processes_see_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            import octavo
            from torch import nn

            torch.set_num_threads(1)
            torch.manual_seed(0)
            class Routed(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.w1, self.w3 = (nn.Parameter(torch.randn(3, 5, 6)) for _ in range(2))
                    self.w2 = nn.Parameter(torch.randn(3, 6, 5))

                def forward(self, x, index):
                    silu = torch.einsum("ti,taoi -> tao", x, self.w1[index]).sigmoid()
                    return torch.einsum("tao,taio -> tai", silu, self.w2[index])

            class Block(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.experts = Routed()

                def forward(self, x):
                    return self.experts(x, x[:, :2].abs().mul(1.5).long().clamp(max=2)).sum(1)

            octavo.register_experts(
                Routed, up=("w1", "w3"), down="w2", routing="each", gate=lambda layer, h: h.chunk(2, -1)[0].sigmoid()
            )
            model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Block(), nn.Linear(6, 2))
            batches = [torch.randn(3 + i, 4) for i in range(5)]
            if sys.argv[1] == "two":
                torch.distributed.init_process_group("gloo")
            stats = octavo.calibrate(model, batches)
            if sys.argv[1] == "one" or torch.distributed.get_rank() == 1:
                stats.save(sys.argv[2])
            if sys.argv[1] == "two":
                torch.distributed.destroy_process_group()
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(octavo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run = [sys.executable, str(script), "one", str(one)]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "two",
        str(two),
    ]  # fmt: skip
    for command in (run, torchrun):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert_equal_stats(Stats.load(one), Stats.load(two))
    assert Stats.load(one).observers["0"].tokens == 3 + 4 + 5 + 6 + 7
    assert 25 <= int(Stats.load(one).experts["2.experts.w2"].tokens.sum()) <= 50


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self, x: Tensor, decoder_inputs_embeds: Tensor, attention_mask: Tensor, decoder_attention_mask: Any = None
    ) -> Tensor:
        return self.decoder(decoder_inputs_embeds) + self.encoder(x).mean()


@pytest.mark.parametrize("masked", [True, False])
def test_no_token_of_a_decoder_is_missed_where_the_encoder_has_as_many(masked: bool) -> None:
    """Which of two masks of one shape is whose cannot be told: what either counts is counted."""
    x, y = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    batch = {"x": x, "decoder_inputs_embeds": y, "attention_mask": torch.tensor([[1, 0, 0]])}
    stats = calibrate(EncoderDecoder(), [batch | ({"decoder_attention_mask": torch.ones(1, 3)} if masked else {})])
    assert torch.equal(stats.observers["decoder"].amax, y.abs().amax((0, 1)))


def test_labels_are_a_decoders_input() -> None:
    """Though the encoder was fed as many tokens, and its mask would fit."""

    class OfLabels(EncoderDecoder):
        config = types.SimpleNamespace(is_encoder_decoder=True)

        def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, y, attention_mask)

    x, y, labels = torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.tensor([[7, 0, -100]])
    batch = {"x": x, "labels": labels, "attention_mask": torch.tensor([[1, 0, 0]])}
    stats = calibrate(OfLabels(), [batch])
    assert torch.equal(stats.observers["decoder"].amax, y[0, :2].abs().amax(0))


def test_inference_tensors_are_calibrated_on() -> None:
    """They count no versions; what is fed to two layers is looked at twice."""
    model = Branches()
    x = torch.randn(6, 4)
    expected = calibrate(model, [x])
    with torch.inference_mode():
        found = calibrate(model, [x.clone()])
    for name, seen in expected.observers.items():
        assert torch.equal(found.observers[name].amax, seen.amax)


def test_a_tuple_reaches_the_model_as_one() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
            return self.layer(x) * {(2, 4): 1}[size]

    assert calibrate(Sized(), [{"x": torch.randn(2, 4), "size": (2, 4)}]).observers
