"""What did quantizing cost? A model's perplexity, and an int8 model held against the float model that it came from.

    KL       mean over positions of sum_v p(v) * (log p(v) - log q(v)), in nats; p = softmax of the float logits,
             q = softmax of the int8 logits
    top-1    fraction of positions where both models choose the same token (class): that of the highest logit, the first
             of equal ones, as greedy decoding takes it. In bf16 and fp16 many are equal, and rounding decides
    SQNR     10 * log10(sum f^2 / sum (f - q)^2), in dB: at 20 dB the error is a tenth of the signal, at 40 a hundredth
    cosine   sum f*q / (|f| * |q|) of a position's output row

Perplexity moves little and in either direction; KL and SQNR see every change, and say where it is.

A model here is any callable: nothing in this file knows how a model was quantized. An `nn.Module` is judged in eval
mode and without gradients, fed on the device of its first parameter, and given back in the mode that it came in; any
other callable is called as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import EvaluateError, OctavoWarning
from octavo.feeding import (
    Progress,
    check_batches,
    device_of,
    eval_mode,
    feed,
    hooked,
    padding_masks,
    same_random_numbers,
)
from octavo.model_code.products import products_as_calls
from octavo.modules import QuantModule
from octavo.report import Comparison, LayerQuality, NotCompared
from octavo.smoothing.smoothed import smooth_scales

__all__ = ["compare", "perplexity", "sqnr"]

Model = Callable[..., Any]
_CHUNK_ELEMENTS = 1 << 16
"""Outputs are widened in pieces of this many elements (512 KiB in float64), which stay in the cache; a float64 copy of
the logits over a large vocabulary would be the peak of the memory. Measured on [512, 49152] logits, 2 cores: `compare`
takes 0.2 to 0.3 s for them in pieces of 2**16, 0.5 to 0.6 s in pieces of 2**22."""


def perplexity(model: Model, token_ids: Tensor, *, window: int = 512, progress: Progress | None = None) -> float:
    """exp of the mean negative log likelihood, in nats, of each token given those before it in its window.

    The text is cut into windows that do not overlap; the first token of a window has nothing before it and is not
    counted, nor is a last window of one token. A longer window means a lower perplexity: compare only equal windows.

    model: called with ids int64 [1, w], w <= window; returns logits [1, w, V] floating point, or an object, dict or
        tuple that holds them (see `compare`).
    token_ids: int64 [T] or [1, T], T >= 2.
    window: tokens that the model sees at once.
    progress: called with (windows done, number of windows).
    Returns: the perplexity, >= 1; inf when a token was given no probability at all. Log likelihoods are computed in
        fp32 (fp64 for fp64 logits) and summed in fp64.
    Raises: EvaluateError for ids of another dtype or shape, negative ids, fewer than two tokens, a window below 2,
        logits of another shape or holding NaN (naming the window), and a model that sees the tokens that it is to
        predict: a masked language model's number would mean nothing.
    """
    ids = _token_row(token_ids)
    if not isinstance(window, int) or window < 2:
        raise EvaluateError(
            f"window is {window!r}, expected a whole number of at least 2: the first token predicts the next"
        )
    starts = range(0, len(ids) - 1, window)
    device = device_of(model, "model")
    total, predicted = 0.0, 0
    with eval_mode(model):
        for index, start in enumerate(starts):
            piece = ids[start : start + window].to(device)
            where = f"window {index} (tokens {start} to {start + len(piece) - 1})"
            logits, _ = _main_output(model(piece.unsqueeze(0)), f"{where}: the model")
            if logits.shape[:-1] != (1, len(piece)) or int(piece.max()) >= logits.shape[-1]:
                raise EvaluateError(
                    f"{where}: logits have shape {list(logits.shape)} for {len(piece)} tokens with ids up to "
                    f"{int(piece.max())}, expected [1, {len(piece)}, V] with V above every id; "
                    "is this a causal language model, and are the ids from its own tokenizer?"
                )
            loss = _negative_log_likelihood(logits[0, :-1], piece[1:])
            if math.isnan(loss):
                raise EvaluateError(
                    f"{where}: logits hold NaN or inf, expected finite values; run the model in fp32 or bf16"
                )
            if index == 0 and _looks_ahead(model, piece[:_LOOKED_AT], device):
                raise EvaluateError(
                    "model: its logits change with the tokens that come after, as a masked language model's (BERT) do, "
                    "expected a causal language model; octavo.compare judges models of any kind"
                )
            total += loss
            predicted += len(piece) - 1
            if progress is not None:
                progress(index + 1, len(starts))
    return torch.tensor(total / predicted, dtype=torch.float64).exp().item()


_LOOKED_AT = 16
"""First tokens of a text by which causal language models are told from others."""

_MOVED = 0.05
"""Of its own size, that a row of logits may move by when later tokens change. Those of causal models move by rounding,
if at all, those of all-MiniLM-L6-v2 (BERT) by 0.25 to 0.6, in int8 too."""


def _looks_ahead(model: Model, ids: Tensor, device: torch.device | None) -> bool:
    """Whether the logits of the first half of `ids` [w] are others when the second half is. An int8 model with one
    dynamic scale for all tokens (SmoothQuant-O2) is not asked: by its rounding any token changes all."""
    half = len(ids) // 2
    other = ids.clone()
    other[half:] = ids[0]
    if torch.equal(other, ids) or _has_one_scale_for_all_tokens(model):
        return False
    rows = []
    for each in (ids, other):
        with same_random_numbers(device):
            rows.append(_float64(_main_output(model(each.unsqueeze(0)), "the model")[0][0, :half]))
    finite = rows[0].isfinite() & rows[1].isfinite()  # forbidden tokens have -inf
    before, after = (torch.where(finite, each, 0.0) for each in rows)
    size = (before - before.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((after - before).norm(dim=-1) > _MOVED * size).double().mean() > 0.5)


def _has_one_scale_for_all_tokens(model: Model) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inputs = [module.scheme.input for module in modules if isinstance(module, QuantModule)]
    return any(args is not None and args.dynamic and args.granularity == "per_tensor" for args in inputs)


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
    check_batches(batches)
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
        for f, q in _chunks(reference.reshape(-1), actual.reshape(-1).to(reference.device)):
            self.signal += _float64(f).square().sum().item()
            self.noise += (_float64(f) - _float64(q)).square().sum().item()

    def sqnr_db(self) -> float:
        if not math.isfinite(self.signal) or not math.isfinite(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@dataclasses.dataclass
class _LayerTally:
    """One layer so far; `kept` holds the float outputs of this batch that the int8 model has not reached yet.

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
        """Empty for a layer that has an SQNR."""
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
        masks = [mask for mask in masks if _fits(f, mask)][-1:]  # of a decoder, whose output it is, its own
        self.is_logits = self.is_logits and reference[1] and actual[1] and f.shape[-1:] > (1,)
        f, q = _rows(_without_padding(f, masks)), _rows(_without_padding(q, masks)).to(f.device)
        for f_rows, q_rows in _chunks(f, q):
            self._add_rows(_float64(f_rows), _float64(q_rows), where)

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
    # -inf in both is a token that neither may choose: 0 * NaN, which counts as nothing.
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


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over rows of log(sum exp logits) - logits[target]. logits: [n, V]; targets: int64 [n]."""
    total = 0.0
    for rows, wanted in _chunks(logits, targets.to(logits.device)):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        losses = nn.functional.cross_entropy(rows, wanted, reduction="none")
        total += _float64(losses).sum().item()
    return total


def _chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching pieces of `x` and `y` along dim 0, of _CHUNK_ELEMENTS of `x` or one row at most; none if it is empty."""
    step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x) if x.numel() else 0, step):
        yield x[start : start + step], y[start : start + step]


def _float64(x: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (x.cpu() if x.device.type == "mps" else x).double()


def _rows(x: Tensor) -> Tensor:
    """View an output as positions: [..., V] -> [n, V]."""
    return x.reshape(1, 1) if x.dim() == 0 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _fits(x: Tensor, mask: Tensor) -> bool:
    """Whether a mask [B, T] is one of positions of x [B, T, ...]."""
    return x.dim() >= 3 and x.shape[:2] == mask.shape


def _without_padding(x: Tensor, masks: list[Tensor]) -> Tensor:
    """The positions of [B, T, ...] that any of the masks that fit keeps; all of `x` where none fits."""
    fitting = [mask.to(x.device) for mask in masks if _fits(x, mask)]
    return x[torch.stack(fitting).any(0)] if fitting else x


def _token_row(token_ids: Tensor) -> Tensor:
    got = f"{token_ids.dtype} {list(token_ids.shape)}" if isinstance(token_ids, Tensor) else type(token_ids).__name__
    if not isinstance(token_ids, Tensor) or token_ids.dtype != torch.int64:
        raise EvaluateError(
            f"token_ids: got {got}, expected an int64 tensor; torch.tensor(tokenizer.encode(text)) is one"
        )
    if token_ids.dim() not in (1, 2) or (token_ids.dim() == 2 and token_ids.shape[0] != 1):
        raise EvaluateError(
            f"token_ids: got {got}, expected one row of tokens, [T] or [1, T]; join or loop over the rows"
        )
    ids = token_ids.reshape(-1)
    if len(ids) < 2:
        raise EvaluateError(
            f"token_ids: got {len(ids)} tokens, expected at least 2; a longer text gives a better measure"
        )
    if int(ids.min()) < 0:
        raise EvaluateError(f"token_ids: holds {int(ids.min())}, expected ids from 0 up; remove padding such as -100")
    return ids


def _main_output(output: Any, who: str) -> tuple[Tensor, bool]:
    """The tensor that judges a model's output, and whether it is logits: see `compare`."""
    found: Any = None
    is_logits = True
    if isinstance(output, Tensor):
        found = output
    elif isinstance(getattr(output, "logits", None), Tensor):
        found = output.logits
    elif isinstance(getattr(output, "last_hidden_state", None), Tensor):
        found, is_logits = output.last_hidden_state, False
    elif isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        found = output["logits"]
    elif isinstance(output, Mapping):
        name = next((name for name, value in output.items() if _is_floating(value)), "")
        found, is_logits = output.get(name), "logits" in str(name)
    elif isinstance(output, tuple | list):
        found = _first_floating(output)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        got = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise EvaluateError(
            f"{who} returned {got}, expected a floating-point tensor, an object with .logits or .last_hidden_state, or "
            "a dict or tuple with such a tensor; wrap the model in a function that returns the tensor to judge"
        )
    return found, is_logits


def _is_floating(value: Any) -> bool:
    # A 0-d tensor in a dict or tuple is a loss that stands before the output.
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _first_floating(output: Any) -> Tensor | None:
    """A layer's output tensor: itself, or the first of its tuple, list or dict."""
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    return next((value for value in values if _is_floating(value)), None)


def _run(model: Model, batch: Any, device: torch.device | None, who: str) -> tuple[Tensor, bool]:
    return _main_output(feed(model, batch, device, who), who)


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
        record(tally, _first_floating(output))

    return hook
