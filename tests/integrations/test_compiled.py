"""Compiled generation writes what the model writes, in one graph for prefill and one for decode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters

import octavo
from octavo import OctavoError
from octavo.integrations import side_by_side
from octavo.integrations.compiled import CompiledModel, TokenChoice
from octavo.integrations.generation import generate
from octavo.integrations.language_model import load_language_model
from tests.tiny_checkpoints import language_model
from tests.tiny_models import TEXT, VOCABULARY, build, gpt2, llama, mixtral, qwen2, qwen3_moe, tokens

LENGTH = 30
NEW = 10


def gemma2() -> Any:
    config = transformers.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=6)
    return transformers.Gemma2ForCausalLM(config)


def lfm2() -> Any:
    """Convolutions with a state, next to attention."""
    layers = ["conv", "full_attention"]
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**TEXT, num_key_value_heads=2, layer_types=layers))


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


def opt() -> Any:
    """It asks in Python how long the sequence is."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
        word_embed_proj_dim=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def without_cache(model: Any, prompt: Tensor) -> list[int]:
    """What the model writes, the whole text fed anew for each token."""
    ids = prompt
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt.shape[1] :].tolist()


def written(compiled: CompiledModel, prompt: Tensor) -> list[int]:
    chosen = [compiled.prefill(prompt)]
    for _ in range(NEW - 1):
        chosen.append(compiled.decode(chosen[-1]))
    return [int(token) for token in chosen]


@pytest.mark.parametrize(
    ("make", "scheme"),
    [(llama, "w8a16"), (qwen2, "w8a8"), (gpt2, "w8a8"), (gemma2, "w8a8"), (mixtral, "w8a8"), (qwen3_moe, "w8a16"),
     (lfm2, "w8a8")],
)  # fmt: skip
def test_one_graph_for_prompts_of_all_lengths(make: Callable[..., Any], scheme: str, compiled_eagerly: None) -> None:
    model = build(make)
    octavo.quantize(model, scheme)
    compiled = CompiledModel(model, LENGTH)
    before = graphs()
    compiled.compile(tokens(1, 9))
    assert graphs() - before == 2
    for prompt in (tokens(1, 9), tokens(1, LENGTH - NEW)):
        assert written(compiled, prompt) == without_cache(model, prompt)
    assert graphs() - before == 2
    for prompt in (tokens(1, 2), tokens(1, 1)):  # shorter than a convolution is wide: another graph
        assert written(compiled, prompt) == without_cache(model, prompt)


def test_static_scales_and_int8_attention(compiled_eagerly: None) -> None:
    model, prompt = build(llama), tokens(1, 9)
    stats = octavo.calibrate(model, [tokens(2, 9)])
    octavo.quantize(model, "w8a8-static", stats=stats, attention="int8")
    compiled = CompiledModel(model, LENGTH)
    compiled.compile(prompt)
    eager = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    # A second text finds nothing of the first: int8 attention's scales would see it.
    assert written(compiled, tokens(1, 15)) and written(compiled, prompt) == eager[0, 9:].tolist()


def test_what_does_not_fit_the_cache_is_refused(compiled_eagerly: None) -> None:
    """Before it is run; what fits to the last place is written, and a new sequence has all the room."""
    model, prompt = build(llama), tokens(1, LENGTH - 2)
    compiled = CompiledModel(model, LENGTH)
    full = f"length: is {LENGTH}, .* which are {LENGTH + 1} tokens by now; make a CompiledModel of greater length"
    with pytest.raises(OctavoError, match=full):
        compiled.compile(tokens(1, LENGTH + 1))
    compiled.compile(prompt)
    chosen = [compiled.prefill(prompt)]
    with pytest.raises(OctavoError, match=full):
        compiled.prefill(tokens(1, LENGTH + 1))  # and the sequence goes on
    chosen += [compiled.decode(chosen[-1])]
    chosen += [compiled.decode(chosen[-1])]
    assert [int(token) for token in chosen] == without_cache(model, prompt)[:3]
    with pytest.raises(OctavoError, match=full):
        compiled.decode(chosen[-1])
    for prompt in (tokens(1, LENGTH), tokens(1, 1)):
        assert int(compiled.prefill(prompt)) == without_cache(model, prompt)[0]
    token = tokens(1, 1)
    for _ in range(LENGTH - 1):
        token = compiled.decode(token)
    with pytest.raises(OctavoError, match=full):
        compiled.decode(token)


def test_a_model_without_a_cache_of_keys_is_refused_before_compiling() -> None:
    with pytest.raises(OctavoError, match=r"MambaForCausalLM keeps its state in no key-value cache.*--compile"):
        CompiledModel(build(mamba), LENGTH)


def test_what_cannot_be_compiled_is_told(compiled_eagerly: None) -> None:
    compiled = CompiledModel(build(opt), LENGTH)
    with pytest.raises(OctavoError, match=r"OPTForCausalLM cannot be compiled: .*leave out --compile"):
        compiled.compile(tokens(1, 9))


class Restless(torch.nn.Module):
    """A choice of tokens that is another program at each one."""

    calls = 0

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        return logits.argmax(-1, keepdim=True) * self.calls


def test_a_step_that_is_never_the_same_is_refused(compiled_eagerly: None) -> None:
    compiled = CompiledModel(build(llama), LENGTH, Restless())
    with pytest.raises(OctavoError, match="another program at each token"):
        compiled.compile(tokens(1, 9))


@pytest.mark.parametrize("make", [llama, mixtral])
def test_codes_are_not_compared_at_each_token(make: Callable[..., Any], compiled_eagerly: None) -> None:
    """That took longer than a small layer's product. By dynamo's own account of what it compares at a call."""
    model = build(make)
    octavo.quantize(model, "w8a16", include=["Embedding", "OutputHead"])
    compiled = CompiledModel(model, LENGTH)
    compiled.compile(tokens(1, 9))
    for step in (compiled._prefill, compiled._decode):
        (entry,) = _debug_get_cache_entry_list(step._torchdynamo_orig_callable.__code__)
        of_tensors = [line for line in str(entry.guard_manager).splitlines() if "TENSOR_MATCH" in line]
        assert any("cache" in line for line in of_tensors), "dynamo's account is another one by now"
        assert not any("_buffers" in line for line in of_tensors)


# -- how tokens are chosen --------------------------------------------------------------------------------------------


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    choose = TokenChoice(torch.tensor([[0]]), 5, [], sample=True)
    drawn = torch.bincount(torch.cat([choose(logits) for _ in range(20_000)]).flatten(), minlength=4) / 20_000
    torch.testing.assert_close(drawn, logits[0].softmax(-1), rtol=0, atol=0.015)
    assert drawn[3] == 0


def test_the_generation_config_is_honoured(tmp_path: Path, compiled_eagerly: None) -> None:
    """Repetitions are penalized, compiled or not, and that changes the text."""
    model, tokenizer = load_language_model(language_model(tmp_path))
    model.float()
    texts = []
    for penalty in (1.0, 3.0):
        model.generation_config.repetition_penalty = penalty
        eager = generate(model, tokenizer, "The names", max_new_tokens=12)
        compiled = generate(model, tokenizer, "The names", max_new_tokens=12, compiling=contextlib.nullcontext())
        assert compiled.text == eager.text and compiled.new_tokens == eager.new_tokens
        assert eager.compile_s is None and compiled.compile_s is not None
        texts.append(eager.text)
    assert texts[0] != texts[1]


def test_drawn_text_repeats_with_its_seed(tmp_path: Path, compiled_eagerly: None) -> None:
    model, tokenizer = load_language_model(language_model(tmp_path))

    def drawn(seed: int) -> str:
        options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 2.0, "compiling": contextlib.nullcontext()}
        return generate(model, tokenizer, "The names", seed=seed, **options).text

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_processor_that_counts_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load_language_model(language_model(tmp_path))
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(OctavoError, match="asks for NoRepeatNGramLogitsProcessor, which is not for compiled"):
        generate(model, tokenizer, "The names", compiling=contextlib.nullcontext())


# -- with Inductor ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, when inductor is imported
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_a_real_model_writes_the_same(scheme: str, smollm2: Path) -> None:
    """In fp32: Inductor rounds less often to bf16 than eager code, which turns a token that is nearly a tie."""
    model, tokenizer = load_language_model(smollm2)
    del model.model.layers[4:]  # to be compiled in seconds
    model.config.num_hidden_layers = 4
    octavo.quantize(model.float(), scheme)
    options: dict[str, Any] = {"max_new_tokens": 24, "raw": True}
    eager = generate(model, tokenizer, "The capital of France is", **options)
    compiled = generate(model, tokenizer, "The capital of France is", compiling=contextlib.nullcontext(), **options)
    assert compiled.text == eager.text and compiled.new_tokens == eager.new_tokens > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_layers_side_by_side_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are on a GPU: q/k/v and gate/up of each of two blocks."""
    from torch._inductor.utils import fresh_cache

    join, found = side_by_side._join, []

    def counted(graph: Any, layers: list[Any]) -> None:
        found.append(len(layers))
        join(graph, layers)

    monkeypatch.setattr(side_by_side, "_join", counted)
    monkeypatch.setattr(side_by_side, "_is_row_on_gpu", lambda x: x.meta["val"].numel() == x.meta["val"].shape[-1])
    model = build(llama)
    octavo.quantize(model, "w8a16")
    compiled = CompiledModel(model, LENGTH)
    prompt = tokens(1, 1)  # so that decode is all that is compiled
    with fresh_cache():  # neither graphs that were not joined, nor for others those that are
        compiled.compile(prompt)
    assert found == [3, 2, 3, 2]
    assert written(compiled, prompt) == without_cache(model, prompt)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", [llama, mixtral])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_a_cuda_graph_writes_the_same(make: Callable[..., Any], scheme: str) -> None:
    model = build(make)
    octavo.quantize(model, scheme)
    model.cuda()
    compiled = CompiledModel(model, LENGTH)
    compiled.compile(tokens(1, 9).cuda())
    for prompt in (tokens(1, 9).cuda(), tokens(1, 15).cuda()):
        assert written(compiled, prompt) == without_cache(model, prompt)
    assert not counters["inductor"]["cudagraph_skips"]
