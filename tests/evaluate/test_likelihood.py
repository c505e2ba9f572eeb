from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import octavo
from octavo.errors import EvaluateError
from octavo.evaluate import compare, outputs, perplexity
from tests.evaluate.truth import fixed, log_softmax


def bigram(table: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda ids: table[ids]


def true_perplexity(table: Tensor, ids: list[int], window: int) -> float:
    rows = table.double().numpy()
    losses = [-float(log_softmax(rows[ids[i]])[ids[i + 1]]) for i in range(len(ids) - 1) if (i + 1) % window != 0]
    return math.exp(sum(losses) / len(losses))


@given(st.integers(2, 40), st.integers(2, 12), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_perplexity_is_that_of_loops_in_float64(length: int, window: int, dtype: torch.dtype) -> None:
    torch.manual_seed(length * 100 + window)
    table = (3 * torch.randn(11, 11)).to(dtype)
    ids = torch.randint(0, 11, (length,))
    found = perplexity(bigram(table), ids, window=window)
    assert found == pytest.approx(true_perplexity(table, ids.tolist(), window), rel=1e-6)
    assert perplexity(bigram(table), ids.unsqueeze(0), window=window) == found


def test_perplexity_of_no_knowledge_is_the_vocabulary() -> None:
    assert perplexity(bigram(torch.zeros(50, 50)), torch.randint(0, 50, (300,)), window=64) == pytest.approx(
        50, rel=1e-6
    )


def test_perplexity_of_logits_in_several_chunks() -> None:
    table = torch.randn(64, 10_000)
    ids = torch.randint(0, 64, (33,))
    assert 33 * table.shape[1] > 4 * outputs.CHUNK_ELEMENTS
    assert perplexity(bigram(table), ids) == pytest.approx(true_perplexity(table, ids.tolist(), 512), rel=1e-6)


def test_perplexity_of_a_token_without_probability_is_inf() -> None:
    table = torch.zeros(3, 3)
    table[:, 2] = -math.inf
    assert perplexity(bigram(table), torch.tensor([0, 1, 2])) == math.inf
    assert perplexity(bigram(table), torch.tensor([0, 1, 0])) == pytest.approx(2.0)
    assert perplexity(bigram(torch.eye(2) * 1e4), torch.tensor([0, 1])) == math.inf


def test_perplexity_never_feeds_more_than_a_window_and_tells_progress() -> None:
    seen: list[tuple[int, ...]] = []
    steps: list[tuple[int, int]] = []

    def model(ids: Tensor) -> Any:
        seen.append(tuple(ids.shape))
        return types.SimpleNamespace(logits=torch.zeros(*ids.shape, 5))

    perplexity(model, torch.zeros(21, dtype=torch.int64), window=10, progress=lambda *step: steps.append(step))
    # The last window of one token has nothing to predict.
    assert seen == [(1, 10), (1, 10)]
    assert steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.tensor([1]), "1 tokens, expected at least 2"),
        (torch.empty(0, dtype=torch.int64), "0 tokens"),
        (torch.tensor([1, 2], dtype=torch.int32), "int32"),
        (torch.tensor([1.0, 2.0]), "float32"),
        (torch.zeros(2, 3, dtype=torch.int64), r"\[2, 3\].*one row"),
        ([1, 2, 3], "list"),
        (torch.tensor([1, -100]), "holds -100"),
        (torch.tensor([0, 9]), "ids up to 9"),
    ],
)
def test_perplexity_refuses_tokens(ids: Any, why: str) -> None:
    with pytest.raises(EvaluateError, match=why):
        perplexity(lambda ids: torch.zeros(*ids.shape, 5), ids)


@pytest.mark.parametrize("window", [1, 0, -1, 2.5, "8"])
def test_perplexity_refuses_windows(window: Any) -> None:
    with pytest.raises(EvaluateError, match="window is"):
        perplexity(bigram(torch.zeros(5, 5)), torch.tensor([1, 2]), window=window)


def test_perplexity_names_the_window_with_nan() -> None:
    good, bad = torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)
    bad[0, 1, 3] = math.nan
    with pytest.raises(EvaluateError, match=r"window 1 \(tokens 4 to 7\).*NaN"):
        perplexity(fixed(good, bad, good), torch.zeros(12, dtype=torch.int64), window=4)
    bad[0, 1, 3] = math.inf
    with pytest.raises(EvaluateError, match="window 0"):
        perplexity(fixed(bad), torch.zeros(4, dtype=torch.int64), window=4)


@pytest.mark.parametrize(
    "output", [torch.zeros(4, 5), torch.zeros(1, 3, 5), torch.zeros(1, 4, dtype=torch.int64), None]
)
def test_perplexity_refuses_what_is_not_logits(output: Any) -> None:
    with pytest.raises(EvaluateError, match="window 0"):
        perplexity(fixed(output), torch.zeros(4, dtype=torch.int64))


def language_model(masked: bool) -> nn.Module:
    """A BERT, which sees all of a text, or a GPT-2: small, and as unlike a model without knowledge as a trained one."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    if masked:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertForMaskedLM(BertConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)).eval()


@pytest.mark.filterwarnings("ignore::octavo.errors.OctavoWarning")  # embeddings stay float
@pytest.mark.parametrize("scheme", [None, "w8a16", "w8a8", "o2"])
@pytest.mark.parametrize("length", [2, 3, 100])
def test_perplexity_of_what_sees_the_tokens_that_it_predicts_is_refused(scheme: str | None, length: int) -> None:
    ids = torch.arange(length) * 7 % 64
    for masked in (True, False):
        model = language_model(masked)
        if scheme is not None:
            octavo.quantize(model, scheme)
        if masked and scheme != "o2":  # whose scale is that of all tokens
            for each in (model, lambda ids, model=model: model(ids).logits):
                with pytest.raises(EvaluateError, match="expected a causal language model"):
                    perplexity(each, ids)
        else:
            assert perplexity(model, ids) > 1


def test_perplexity_of_what_may_not_be_said_or_is_drawn() -> None:
    """Forbidden tokens and noise are none of what comes after."""
    table = torch.randn(7, 7)
    table[:, 2] = -math.inf
    ids = torch.tensor([0, 1, 3, 4, 5, 6, 0, 1])
    assert perplexity(bigram(table), ids) == pytest.approx(true_perplexity(table, ids.tolist(), 512), rel=1e-6)

    def noisy(ids: Tensor) -> Tensor:
        return table[ids] + torch.rand(())

    state = torch.get_rng_state()
    assert perplexity(noisy, ids) == pytest.approx(perplexity(bigram(table), ids), rel=1e-5)
    torch.set_rng_state(state)
    torch.rand(())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    perplexity(noisy, ids)
    assert torch.equal(torch.get_rng_state(), after)


def test_perplexity_runs_in_eval_without_gradients_and_restores_each_modules_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 5)
            self.drop = nn.Dropout(0.5)
            self.cache: Tensor | None = None

        def forward(self, ids: Tensor) -> Tensor:
            assert not self.training and not self.drop.training and not torch.is_grad_enabled()
            self.cache = self.table(ids)
            return self.drop(self.cache)

    model = Model().train()
    model.table.eval()
    ids = torch.randint(0, 5, (9,))
    perplexity(model, ids)
    assert (model.training, model.table.training, model.drop.training) == (True, False, True)
    assert model.cache is not None and not model.cache.is_inference()
    with pytest.raises(IndexError):
        perplexity(model, torch.tensor([0, 7]))
    assert (model.training, model.table.training, model.drop.training) == (True, False, True)
    assert torch.is_grad_enabled()


def test_a_model_without_values_is_refused() -> None:
    empty = nn.Linear(2, 2, device="meta")
    with pytest.raises(EvaluateError, match="model: is on the meta device"):
        perplexity(empty, torch.tensor([0, 1]))
    with pytest.raises(EvaluateError, match="int8_model: is on the meta device"):
        compare(nn.Linear(2, 2), empty, [torch.ones(1, 2)])
