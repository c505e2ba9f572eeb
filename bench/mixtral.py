"""What int8 does to the perplexity and the routing of a trained mixture of experts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import octavo
from bench.language import known_text, losses
from examples.models import cache_folder
from examples.small_mixtral import SHAPE, WINDOW, small_mixtral, split, unigram
from octavo.experts import routers
from octavo.integrations.language_model import load_language_model, token_ids
from octavo.tables import Table, human_bytes, human_percent

TITLE = "A small Mixtral, trained here: int8 experts"
CALIBRATION = 64
CLEAR = 0.05
OUTLIER = 256
HOW = f"""
{SHAPE["num_hidden_layers"]} layers of {SHAPE["num_local_experts"]} experts, {SHAPE["num_experts_per_tok"]} for a token,
trained by `examples/small_mixtral.py` on nine tenths of the text and judged on the last one, in windows of {WINDOW}
tokens that do not overlap; fp32 where it is not int8. Calibrated on {CALIBRATION} windows of what it was trained on.
The ratio is to the float model's perplexity on the same tokens; its standard error, from the windows' own changes, says
how much another text of this length could move it. Same experts: the share of (token, layer) that are routed to the
very set of experts that they are in the float model; of all, and of the clear cases, in which the float model's router
gives the last expert chosen at least {CLEAR} more (of 1) than the first one not chosen. "Smoothed" is
`octavo.smooth(model, stats, alpha="auto")`. A model as small as this has no outliers for it to move; "outliers put in"
is the same float model, bit for bit, with two channels of what attention and experts are fed {OUTLIER} times as large
and their weights as much smaller. Bytes are of all parameters.
"""
TOP_K = SHAPE["num_experts_per_tok"]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to quantize. outliers: see `put_outliers_in`."""

    name: str
    scheme: str
    smooth: bool = False
    outliers: bool = False


WAYS = (
    Way("w8a16", "w8a16"),
    Way("w8a8", "w8a8"),
    Way("w8a8, smoothed", "w8a8", smooth=True),
    Way("w8a8, outliers put in", "w8a8", outliers=True),
    Way("w8a8, outliers put in, smoothed", "w8a8", smooth=True, outliers=True),
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The float model, and what the quantized ones are compared with.

    calibration: windows that it was trained on, each int64 [1, WINDOW].
    ids: the held-out tokens, int64 [T], whole windows. losses, routing: the float model's, see `observe`.
    unigram: perplexity on `ids` of the frequencies that the tokens of the training text have.
    """

    model: Any
    calibration: list[Tensor]
    ids: Tensor
    losses: Tensor
    routing: Tensor
    unigram: float

    @property
    def perplexity(self) -> float:
        return self.losses.mean().exp().item()


def measure() -> dict[str, Any]:
    text, about = known_text()
    trained = prepare(text)
    return {
        "text": about,
        "tokens": len(trained.ids),
        "unigram": trained.unigram,
        "perplexity": trained.perplexity,
        "bytes": sum(parameter.nbytes for parameter in trained.model.parameters()),
        "least_used_expert": usage(trained.routing).min().item(),
        "clear": clear(trained.routing).double().mean().item(),
        "ways": [judge(trained, way) for way in WAYS],
    }


def prepare(text: str) -> Trained:
    """The small Mixtral of `text`, from the cache or trained now."""
    model, tokenizer = load_language_model(small_mixtral(cache_folder(), text))
    training, ids = (token_ids(tokenizer, part, limit=len(part), window=WINDOW) for part in split(text))
    ids = ids[: len(ids) // WINDOW * WINDOW]
    calibration = [one.unsqueeze(0) for one in training[: CALIBRATION * WINDOW].split(WINDOW)]
    frequencies = losses(unigram(training, model.config.vocab_size), ids, WINDOW)
    return Trained(model, calibration, ids, *observe(model, ids), frequencies.mean().exp().item())


def quantized(trained: Trained, way: Way) -> tuple[Any, octavo.Coverage]:
    """A copy of the float model, quantized in a way."""
    model = copy.deepcopy(trained.model)
    if way.outliers:
        put_outliers_in(model)
    if way.smooth:
        octavo.smooth(model, octavo.calibrate(model, trained.calibration), "auto", scheme=way.scheme)
    return model, octavo.quantize(model, way.scheme)


@torch.no_grad()
def put_outliers_in(model: Any) -> None:
    """Give the model outlier channels, which language models of billions of parameters have, and this one lacks.

    Two input channels each of attention and of the experts become much larger, by a power of two, and the weights that
    multiply them as much smaller. So the model computes the same bits.
    """
    for layer in model.model.layers:
        attention, block = layer.self_attn, layer.mlp
        fed = {
            layer.input_layernorm: (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            layer.post_attention_layernorm: (block.gate.weight, block.experts.gate_up_proj),
        }
        for norm, weights in fed.items():
            norm.weight[:2] *= OUTLIER
            for weight in weights:
                weight[..., :2] /= OUTLIER


def judge(trained: Trained, way: Way) -> dict[str, Any]:
    """Compare a quantized copy with the float model."""
    model, coverage = quantized(trained, way)
    q, routing = observe(model, trained.ids)
    change = q - trained.losses
    same = (chosen(routing) == chosen(trained.routing)).all(-1)
    return {
        "name": way.name,
        "quantized_fraction": coverage.quantized_fraction,
        "bytes": coverage.bytes_after,
        "ratio": change.mean().exp().item(),
        "standard_error": (change.std() / len(change) ** 0.5).item(),
        "same_experts": same.double().mean().item(),
        "same_experts_when_clear": same[clear(trained.routing)].double().mean().item(),
    }


def observe(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model on the windows of `ids` int64 [T].

    Returns: the loss of each window, fp64 [T // WINDOW], as `losses` gives it; and the probabilities that the routers
        of the L layers gave each of E experts, fp32 [T, L, E].
    """
    said: dict[str, list[Tensor]] = {name: [] for name in sorted(routers(model))}
    handles = [model.get_submodule(name).register_forward_hook(_recorder(pieces)) for name, pieces in said.items()]
    try:
        found = losses(model, ids, WINDOW)
    finally:
        for handle in handles:
            handle.remove()
    return found, torch.stack([torch.cat(pieces) for pieces in said.values()], 1)


def _recorder(pieces: list[Tensor]) -> Callable[..., None]:
    def hook(router: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        pieces.append(output[0].softmax(-1))

    return hook


def chosen(routing: Tensor) -> Tensor:
    """The experts that run, in ascending order: [T, L, E] -> int64 [T, L, TOP_K]."""
    return routing.topk(TOP_K).indices.sort(-1).values


def clear(routing: Tensor) -> Tensor:
    """Where the choice is not a close one: [T, L, E] -> bool [T, L]."""
    best = routing.topk(TOP_K + 1).values
    return best[..., -2] - best[..., -1] >= CLEAR


def usage(routing: Tensor) -> Tensor:
    """The share of tokens that each expert runs for: [T, L, E] -> fp32 [L, E]; its mean is TOP_K / E."""
    return torch.zeros_like(routing).scatter_(-1, chosen(routing), 1.0).mean(0)


def tables(found: dict[str, Any]) -> list[Table]:
    rows = [
        ("unigram", "", "", f"{found['unigram']:.3f}", "", "", "", ""),
        ("float", human_bytes(found["bytes"]), "", f"{found['perplexity']:.3f}", "1", "", "", ""),
    ]
    for way in found["ways"]:
        rows.append(
            (
                way["name"],
                human_bytes(way["bytes"]),
                f"{way['quantized_fraction']:.1%}",
                f"{found['perplexity'] * way['ratio']:.3f}",
                f"{way['ratio']:.5f}",
                f"{way['standard_error']:.5f}",
                human_percent(way["same_experts"]),
                human_percent(way["same_experts_when_clear"]),
            )
        )
    title = (
        f"The last {found['tokens']} tokens of {found['text']}; {human_percent(found['clear'])} of choices are clear, "
        f"the least used expert of a layer runs for {human_percent(found['least_used_expert'])} of tokens"
    )
    columns = (
        "scheme", "bytes", "int8", "perplexity", "ratio", "standard error", "same experts", "same, clear cases",
    )  # fmt: skip
    return [Table(title, columns, tuple(rows), "lrrrrrrr")]
