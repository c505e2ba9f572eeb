"""A small mixture of experts that has learnt from real text, trained here: minutes on two cores.

    folder = small_mixtral(cache, text)     a Mixtral as a fp32 checkpoint with its tokenizer, as any other on disk
    training, held_out = split(text)        what it was trained on, and what to judge it on
    unigram(ids, vocabulary)                the model to beat: how often each token comes, whatever stands before it

Random weights tell little of what int8 does to experts: their routers have no preferences to be disturbed, their
activations no structure. These have both. The tokenizer (byte-level BPE) is trained on the same text.

    python -m examples.small_mixtral        trains it on the text that OCTAVO_TEXT names, or on Python's documentation
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import octavo
from examples.models import cache_folder, make_whole
from octavo.cli.terminal import Terminal
from octavo.cli.text import read_text
from octavo.integrations.hub import no_progress_bar
from octavo.integrations.language_model import load_language_model, token_ids
from octavo.tables import Table, render

__all__ = ["WINDOW", "small_mixtral", "split", "unigram"]

VOCABULARY = 1024
HELD_OUT = 0.1
WINDOW = 128
"""Tokens that the model sees at once, in training and when it is judged."""
BATCH = 8
STEPS = 800
LEARNING_RATE = 5e-3
BALANCE = 0.01
"""Weight of each layer's balancing loss."""
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def small_mixtral(folder: str | Path, text: str) -> Path:
    """A Mixtral trained on the first part of `split(text)`, with its tokenizer: made once in `folder`, seeded.

    The same seed gives the same weights for as many threads on such a machine; another order of sums gives others.
    Returns: `folder`/small-mixtral-DIGEST, of the text and of this file; complete, or not there at all.
    """
    digest = hashlib.sha256(text.encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    path = Path(folder) / f"small-mixtral-{digest}"
    if not path.is_dir():
        print(f"a small Mixtral: trained now, which takes minutes, to be kept in {path}", file=sys.stderr)
        with Terminal().progress("training a small Mixtral") as progress:
            make_whole(path, lambda unfinished: _train(split(text)[0], unfinished, progress))
    return path


def split(text: str) -> tuple[str, str]:
    """The text to train on, and the last tenth, held out."""
    cut = round(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def unigram(ids: Tensor, vocabulary: int) -> Callable[[Tensor], Tensor]:
    """A language model of token frequencies alone: p(v) = (count of v in `ids` + 1) / (T + V), Laplace's estimate.

    ids: int64 [T]. Returns: a function of ids int64 [1, w] that returns logits fp64 [1, w, V].
    """
    log_p = ((torch.bincount(ids, minlength=vocabulary) + 1).double() / (len(ids) + vocabulary)).log()
    return lambda window: log_p.expand(1, window.shape[1], vocabulary)


def _train(text: str, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Tokenizer and model to `folder`."""
    tokenizer = _tokenizer(text)
    ids = token_ids(tokenizer, text, limit=len(text), window=WINDOW)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _untrained()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1, cycle_momentum=False
        )
        for step in range(STEPS):
            starts = torch.randint(len(ids) - WINDOW, (BATCH, 1))
            optimizer.zero_grad()
            _loss(model, ids[starts + torch.arange(WINDOW)]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(step + 1, STEPS)
    with no_progress_bar():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _untrained() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            **SHAPE, vocab_size=VOCABULARY, max_position_embeddings=WINDOW, bos_token_id=None, eos_token_id=None
        )
    )


def _loss(model: Any, batch: Tensor) -> Tensor:
    """Cross entropy, and what keeps every expert of every layer in use (Switch Transformers, arXiv:2101.03961, eq. 4).

    The model's own balancing loss takes the layers together, so that experts die in one layer that are used in another.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    out = model(input_ids=batch, output_router_logits=True, use_cache=False)
    experts, top_k = SHAPE["num_local_experts"], SHAPE["num_experts_per_tok"]
    balance = sum(load_balancing_loss_func((one,), experts, top_k) for one in out.router_logits)
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) + BALANCE * balance


def _tokenizer(text: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> int:
    text, about = read_text("OCTAVO_TEXT", os.environ.get("OCTAVO_TEXT"))
    model, tokenizer = load_language_model(small_mixtral(cache_folder(), text))
    training, held_out = (token_ids(tokenizer, part, limit=len(part), window=WINDOW) for part in split(text))
    rows = [
        (name, f"{octavo.perplexity(judged, held_out, window=WINDOW):.2f}")
        for name, judged in (("unigram", unigram(training, VOCABULARY)), ("Mixtral", model))
    ]
    title = f"The held-out tenth, {len(held_out)} tokens, of {about}"
    print(render(Table(title, ("model", "perplexity"), tuple(rows), "lr")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
