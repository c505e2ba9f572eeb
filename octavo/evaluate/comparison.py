"""Compare an int8 model with its float model: KL, top-1 agreement, cosine, and SQNR of the output and of each layer.

Both models are run on the same batches, in one pass. The outputs of the quantized layers are seen by hooks. The
measures are defined at the head of `octavo.evaluate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import EvaluateError, OctavoWarning
from octavo.evaluate.outputs import Model, chunks, first_floating, float64, main_output
from octavo.feeding import (
    Progress,
    check_batches,
    check_callable,
    check_progress,
    device_of,
    eval_mode,
    feed,
    hooked,
    padding_masks,
    same_random_numbers,
)
from octavo.model_code.products import products_as_calls
from octavo.report import Comparison, LayerQuality, NotCompared
from octavo.smoothing.smoothed import smooth_scales

__all__ = ["compare", "sqnr"]


def compare(
    float_model: Model,
    int8_model: Model,
    batches: Iterable[Any],
    *,
    layers: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models over `batches` once, and measure how far the int8 model is from the float model.

    float_model, int8_model: called alike with each batch; random numbers that they draw (noise) are the same. The
        output judged is, of what a model returns: a tensor; `.logits`; `.last_hidden_state`; the "logits" of a dict;
        the first floating-point tensor of a dict or tuple. It is [..., V], each row over V is a position. A tensor, a
        tuple's tensor and what is called logits are taken as logits when V > 1; KL and top-1 are None for any other.
    batches: iterable of tensors, tuples (positional arguments) or dicts (keyword arguments). Where a dict has an
        `attention_mask` [B, T], positions with a 0 there do not count, in outputs [B, T, ...] of model and layers; of
        an encoder-decoder's output it is `decoder_attention_mask` that says so.
    layers: also the output SQNR of each module of the int8 model that says what of it is quantized (it has an attribute
        `quantized_params`), against the module of the same name in the float model. Both must be nn.Module. What
        `octavo.smooth` divided outputs by (of up_proj, v_proj) is taken back first; to find it, the float model is run
        on the first tokens of the first batch a few times more, if its weights are not those that became int8.
    progress: called with (batches done, number of batches or 0).
    Returns: Comparison. Logits of -inf in both models at the same place (tokens that are forbidden) count as equal.
    Raises: EvaluateError for batches that are none or of another type, outputs that are no floating-point tensors, of
        different shapes, or hold NaN or inf. Hooks are removed and modes restored whatever happens.

    Memory: besides the models, both outputs of one batch, and a copy of the float output of every quantized layer for
    one batch; `layers=False` or smaller batches make it less. Sums are in float64.
    """
    check_callable(float_model, "float_model")
    check_callable(int8_model, "int8_model")
    check_batches(batches)
    check_progress(progress)
    total = operator.length_hint(batches)  # 0 for a generator, and for a DataLoader of an IterableDataset
    tallies = _layers_to_compare(float_model, int8_model) if layers else {}
    devices = device_of(float_model, "float_model"), device_of(int8_model, "int8_model")
    output = _OutputTally()
    count = 0
    with eval_mode(float_model, int8_model), products_as_calls(float_model), products_as_calls(int8_model):
        for count, batch in enumerate(batches, start=1):
            where = f"batch {count - 1}"
            masks = padding_masks(float_model, batch)
            if tallies and count == 1:
                assert isinstance(float_model, nn.Module) and isinstance(int8_model, nn.Module)
                for name, factors in smooth_scales(float_model, int8_model, batch).items():
                    tallies[name].smooth_scale = factors
            with _hooks(float_model, tallies, _LayerTally.keep), same_random_numbers(devices[0]):
                reference = _run(float_model, batch, devices[0], f"{where}: the float model")
            with _hooks(int8_model, tallies, functools.partial(_LayerTally.judge, masks=masks)):
                actual = _run(int8_model, batch, devices[1], f"{where}: the int8 model")
            output.add(reference, actual, masks, where)
            for tally in tallies.values():
                tally.end_batch()
            if progress is not None:
                progress(count, total)
    if not output.positions:
        raise EvaluateError(
            f"batches: got {count} with no position to compare in them, expected at least one that is not padding"
            + ("" if count else "; an iterator can be read only once")
        )
    return output.comparison(count, tallies)


def sqnr(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio in dB: 10 * log10(sum reference^2 / sum (reference - actual)^2).

    reference, actual: floating point, of one shape (any); on any device.
    Returns: dB, computed in float64. inf for equal tensors, -inf for a reference of zeros with an `actual` that is not,
        NaN if either holds NaN or inf.
    Raises: EvaluateError for another dtype, or different shapes.
    """
    for name, tensor in (("reference", reference), ("actual", actual)):
        if not isinstance(tensor, Tensor):
            raise EvaluateError(f"{name} is a {type(tensor).__name__}, expected a tensor; torch.as_tensor makes one")
        if not tensor.is_floating_point():
            raise EvaluateError(f"{name} is {tensor.dtype}, expected floating point; dequantize codes first")
    if reference.shape != actual.shape:
        raise EvaluateError(
            f"reference has shape {list(reference.shape)}, actual has {list(actual.shape)}; expected one shape"
        )
    power = _Power()
    power.add(reference, actual)
    return power.sqnr_db()


@dataclasses.dataclass
class _Power:
    """Sums of squares, float64, of a signal and of the error in it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, actual: Tensor) -> None:
        for f, q in chunks(reference.reshape(-1), actual.reshape(-1).to(reference.device)):
            self.signal += float64(f).square().sum().item()
            self.noise += (float64(f) - float64(q)).square().sum().item()

    def sqnr_db(self) -> float:
        if not math.isfinite(self.signal) or not math.isfinite(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclasses.dataclass
class _LayerTally:
    """Sums over the outputs of one layer so far.

    kept: the float model's outputs for this batch that the int8 model has yet to be compared with.
    smooth_scale: fp32 [N], what smoothing divided the channels of the int8 model's output by; None for nothing.
    """

    kind: str
    problem: str = ""
    smooth_scale: Tensor | None = None
    power: _Power = dataclasses.field(default_factory=_Power)
    kept: list[Tensor | None] = dataclasses.field(default_factory=list)
    calls: int = 0

    def keep(self, value: Tensor | None) -> None:
        # A copy: what follows may overwrite it, as ReLU(inplace=True) does.
        self.kept.append(None if value is None else value.clone())

    def judge(self, value: Tensor | None, masks: list[Tensor]) -> None:
        self.calls += 1
        if not self.kept:
            self.problem = self.problem or "runs more often in the int8 model than in the float model"
            return
        reference = self.kept.pop(0)
        if reference is None or value is None:
            self.problem = "its output has no floating-point tensor"
        elif reference.shape != value.shape:
            self.problem = f"output shape is {list(reference.shape)} in float, {list(value.shape)} in int8"
        else:
            if self.smooth_scale is not None:
                value = value * self.smooth_scale.to(value.device)
            self.power.add(_without_padding(reference, masks), _without_padding(value, masks))

    def end_batch(self) -> None:
        if self.kept:
            self.problem = self.problem or "runs more often in the float model than in the int8 model"
            self.kept.clear()

    def reason_not_compared(self) -> str:
        """Why the layer has no SQNR; empty if it has one."""
        if self.problem:
            return self.problem
        if not self.calls:
            return "did not run"
        if math.isnan(self.power.sqnr_db()):
            return "its output holds NaN or inf"
        return "its float output is all zeros, its int8 output is not" if self.power.sqnr_db() == -math.inf else ""


@dataclasses.dataclass
class _OutputTally:
    """Sums over the output rows of all batches."""

    positions: int = 0
    kl: float = 0.0
    agreed: int = 0
    is_logits: bool = True
    power: _Power = dataclasses.field(default_factory=_Power)
    cosine_sum: float = 0.0
    cosine_min: float = math.inf
    warned: bool = False

    def add(self, reference: tuple[Tensor, bool], actual: tuple[Tensor, bool], masks: list[Tensor], where: str) -> None:
        f, q = reference[0], actual[0]
        if f.shape != q.shape:
            raise EvaluateError(
                f"{where}: the float model's output has shape {list(f.shape)}, the int8 model's has {list(q.shape)}; "
                "expected one shape, from two models of one architecture"
            )
        self._warn_of_masks(f, masks, where)
        masks = [mask for mask in masks if _fits(f, mask)][-1:]  # the decoder's, if there are two
        self.is_logits = self.is_logits and reference[1] and actual[1] and f.shape[-1:] > (1,)
        f, q = _rows(_without_padding(f, masks)), _rows(_without_padding(q, masks)).to(f.device)
        for f_rows, q_rows in chunks(f, q):
            self._add_rows(float64(f_rows), float64(q_rows), where)

    def _add_rows(self, f: Tensor, q: Tensor, where: str) -> None:
        if self.is_logits:
            self.kl += _kl(f, q).sum().item()
            self.agreed += int((f.argmax(-1) == q.argmax(-1)).sum())
        f, q = _finite_pair(f, q, where)
        signal, noise = _squares(f), _squares(f - q)
        self.positions += len(f)
        self.power.signal += signal.sum().item()
        self.power.noise += noise.sum().item()
        cosine = _cosine((f * q).sum(-1), signal, _squares(q))
        self.cosine_sum += cosine.sum().item()
        self.cosine_min = min(self.cosine_min, cosine.min().item())

    def _warn_of_masks(self, output: Tensor, masks: list[Tensor], where: str) -> None:
        told = any(_fits(output, mask) for mask in masks)
        if self.warned or told or output.dim() < 3 or all(bool(mask.all()) for mask in masks):
            return
        self.warned = True
        warnings.warn(
            f"{where}: attention_mask has shape {list(masks[0].shape)}, the output {list(output.shape)}: which "
            "positions are padding cannot be told, all are counted; expected a mask [B, T] for an output [B, T, ...], "
            "or batches without padding",
            OctavoWarning,
            stacklevel=4,
        )

    def comparison(self, batches: int, tallies: Mapping[str, _LayerTally]) -> Comparison:
        reasons = {name: tally.reason_not_compared() for name, tally in tallies.items()}
        return Comparison(
            batches=batches,
            positions=self.positions,
            # Rounding may leave the KL of two equal rows a hair below zero.
            kl=max(0.0, self.kl / self.positions) if self.is_logits else None,
            top1=self.agreed / self.positions if self.is_logits else None,
            sqnr_db=self.power.sqnr_db(),
            cosine_mean=self.cosine_sum / self.positions,
            cosine_min=self.cosine_min,
            layers=tuple(
                LayerQuality(name, tally.kind, tally.power.sqnr_db())
                for name, tally in tallies.items()
                if not reasons[name]
            ),
            not_compared=tuple(NotCompared(name, reason) for name, reason in reasons.items() if reason),
        )


def _kl(f: Tensor, q: Tensor) -> Tensor:
    """KL(softmax f || softmax q) of each pair of rows in nats, [n], as sum_v p(v) * (f - q)(v) - lse(f) + lse(q)."""
    lse_f, lse_q = f.logsumexp(-1), q.logsumexp(-1)
    p = (f - lse_f.unsqueeze(-1)).exp_()
    # -inf in both is a token that neither model may choose: 0 * NaN, which nansum skips.
    return p.mul_(f - q).nansum(-1) - lse_f + lse_q


def _finite_pair(f: Tensor, q: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Both outputs, with 0 where both are -inf. Raises EvaluateError for any other value that is not finite."""
    if bool(torch.isfinite(f.sum() + q.sum())):
        return f, q
    forbidden = (f == -math.inf) & (q == -math.inf)
    f, q = f.masked_fill(forbidden, 0.0), q.masked_fill(forbidden, 0.0)
    for model, rows in (("float", f), ("int8", q)):
        if not bool(torch.isfinite(rows).all()):
            found = "NaN" if bool(torch.isnan(rows).any()) else "inf"
            raise EvaluateError(
                f"{where}: the {model} model's output holds {found}, expected finite values; "
                "run it in fp32 or bf16, or look for the layer that overflows"
            )
    return f, q


def _cosine(dot: Tensor, f_squares: Tensor, q_squares: Tensor) -> Tensor:
    """Cosine of each pair of rows, [n]; 1 for two rows of zeros, 0 for a row of zeros and one that is not."""
    norms = f_squares.sqrt() * q_squares.sqrt()
    both_zero = (f_squares == 0) & (q_squares == 0)
    # Rounding may carry the cosine of two equal rows a hair above one.
    cosine = (dot / torch.where(norms == 0, 1.0, norms)).clamp(-1.0, 1.0)
    return torch.where(both_zero, 1.0, cosine)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _rows(x: Tensor) -> Tensor:
    """View an output as positions: [..., V] -> [n, V]."""
    return x.reshape(1, 1) if x.dim() == 0 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _fits(x: Tensor, mask: Tensor) -> bool:
    """Whether a mask [B, T] is for the positions of x [B, T, ...]."""
    return x.dim() >= 3 and x.shape[:2] == mask.shape


def _without_padding(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The positions of x [B, T, ...] that any of the fitting masks keeps; all of x if no mask fits."""
    fitting = [mask.to(x.device) for mask in masks if _fits(x, mask)]
    return x[torch.stack(fitting).any(0)] if fitting else x


def _run(model: Model, batch: Any, device: torch.device | None, who: str) -> tuple[Tensor, bool]:
    return main_output(feed(model, batch, device, who), who)


def _layers_to_compare(float_model: Model, int8_model: Model) -> dict[str, _LayerTally]:
    if not isinstance(float_model, nn.Module) or not isinstance(int8_model, nn.Module):
        return {}
    in_float = {name for name, _ in float_model.named_modules()}
    return {
        name: _LayerTally(
            type(module).__name__, "" if name in in_float else "the float model has no module of this name"
        )
        for name, module in int8_model.named_modules()
        if hasattr(module, "quantized_params")
    }


def _hooks(
    model: Model, tallies: Mapping[str, _LayerTally], record: Callable[[_LayerTally, Tensor | None], None]
) -> contextlib.AbstractContextManager[None]:
    """While open, the output of each layer that has a tally (and no problem yet) is recorded in it."""
    layers: dict[str, nn.Module] = {}
    if isinstance(model, nn.Module):
        layers = {name: model.get_submodule(name) for name, tally in tallies.items() if not tally.problem}
    return hooked(layers, lambda name, layer: layer.register_forward_hook(_recorder(tallies[name], record)))


def _recorder(tally: _LayerTally, record: Callable[[_LayerTally, Tensor | None], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        record(tally, first_floating(output))

    return hook
