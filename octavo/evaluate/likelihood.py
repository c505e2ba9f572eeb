"""Perplexity of a causal language model: how well it predicts each token of a text from the tokens before it.

perplexity = exp(-mean over tokens of log p(token | tokens before it in its window))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from octavo.errors import EvaluateError
from octavo.evaluate.outputs import Model, chunks, float64, main_output
from octavo.feeding import Progress, check_callable, check_progress, device_of, eval_mode, same_random_numbers
from octavo.modules import QuantModule

__all__ = ["perplexity"]


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
    check_callable(model, "model")
    check_progress(progress)
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
            logits, _ = main_output(model(piece.unsqueeze(0)), f"{where}: the model")
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
"""At most so many first tokens of a text are used to tell causal language models from others."""

_MOVED = 0.05
"""How far a row of logits may move when later tokens change, relative to its norm. In causal models it moves by
rounding at most, in all-MiniLM-L6-v2 (BERT) by 0.25 to 0.6, in int8 too."""


def _looks_ahead(model: Model, ids: Tensor, device: torch.device | None) -> bool:
    """Whether the logits of the first half of `ids` [w] change when the second half does.

    False for an int8 model with one dynamic scale for all tokens (SmoothQuant-O2): there every token changes the
    rounding of all others.
    """
    half = len(ids) // 2
    other = ids.clone()
    other[half:] = ids[0]
    if torch.equal(other, ids) or _has_one_scale_for_all_tokens(model):
        return False
    rows = []
    for each in (ids, other):
        with same_random_numbers(device):
            rows.append(float64(main_output(model(each.unsqueeze(0)), "the model")[0][0, :half]))
    finite = rows[0].isfinite() & rows[1].isfinite()  # forbidden tokens have -inf
    before, after = (torch.where(finite, each, 0.0) for each in rows)
    size = (before - before.mean(-1, keepdim=True)).norm(dim=-1)
    return bool(((after - before).norm(dim=-1) > _MOVED * size).double().mean() > 0.5)


def _has_one_scale_for_all_tokens(model: Model) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inputs = [module.scheme.input for module in modules if isinstance(module, QuantModule)]
    return any(args is not None and args.dynamic and args.granularity == "per_tensor" for args in inputs)


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over rows of log(sum exp logits) - logits[target]. logits: [n, V]; targets: int64 [n]."""
    total = 0.0
    for rows, wanted in chunks(logits, targets.to(logits.device)):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        losses = nn.functional.cross_entropy(rows, wanted, reduction="none")
        total += float64(losses).sum().item()
    return total


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
