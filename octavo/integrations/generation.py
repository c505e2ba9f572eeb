"""Let a causal language model write text, compiled or not.

model, tokenizer = load_language_model("out/")
written = generate(model, tokenizer, "What is an octavo?", on_text=print)
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from octavo.errors import OctavoError
from octavo.integrations.language_model import broken_template, positions_of, refuse_unknown_tokens

__all__ = ["Generated", "generate"]

MAX_NEW_TOKENS = 128
"""Default of `max_new_tokens`."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a model wrote, and how long it took.

    first_token_s: from the start until the first new token was there. decode_s: from then until the last.
    compile_s: before the start; None if nothing was compiled.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    decode_s: float
    compile_s: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first, per second; None if there are none."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else None


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    on_text: Callable[[str], None] = lambda piece: None,
    compiling: contextlib.AbstractContextManager[Any] | None = None,
) -> Generated:
    """Let `model` continue `prompt` until it ends by itself or after `max_new_tokens`.

    model, tokenizer: as `load_language_model` gives them.
    max_new_tokens: by default 128, or what the model has room for after the prompt.
    temperature: 0 takes the likeliest token each time; otherwise tokens are drawn, with `seed`, which is then the seed
        of torch's global generator.
    raw: feed the prompt as it is; otherwise as a user's message, if the tokenizer has a chat template.
    on_text: called with each piece of text as soon as whole words are there.
    compiling: where it is given, the model is compiled before it writes (`CompiledModel`), inside this context. Greedy
        text is what it would be without; drawn tokens are others, for the same seed.
    Raises: OctavoError for a temperature below 0, or so small that logits over it are infinite; if there is no room for
        so many tokens, if the prompt has none, or some that the model lacks, if the chat template is broken, or if the
        model, or how it is configured to choose tokens, cannot be compiled.
    """
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise OctavoError(f"temperature is {temperature}, expected 0 for the likeliest tokens, or 1e-6 and more")
    inputs = _inputs(tokenizer, prompt, raw).to(model.device)
    if not inputs["input_ids"].numel():
        raise OctavoError("the prompt has no tokens; expected text that the tokenizer has tokens for")
    refuse_unknown_tokens(model, inputs["input_ids"])
    max_new_tokens = _fitting(max_new_tokens, model, inputs["input_ids"].shape[-1])
    streamer = _Streamer(tokenizer, on_text)
    # One text, whatever the checkpoint's generation config says.
    how: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "do_sample": temperature > 0}
    if temperature > 0:
        how["temperature"] = temperature
    loop = None if compiling is None else _CompiledLoop(streamer, compiling)
    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(**inputs, **how, max_new_tokens=max_new_tokens, streamer=streamer, custom_generate=loop)
    compile_s = None if loop is None else loop.compile_s
    times = streamer.times
    return Generated(
        "".join(streamer.pieces),
        prompt_tokens=inputs["input_ids"].shape[-1],
        new_tokens=len(times),
        first_token_s=times[0] - start - (compile_s or 0.0),
        decode_s=times[-1] - times[0],
        compile_s=compile_s,
    )


def _fitting(wanted: int | None, model: Any, prompt_tokens: int) -> int:
    """How many tokens to write: `wanted`, or the default reduced to the room after the prompt. Raises: OctavoError if
    there is no room."""
    positions = positions_of(model)
    if positions is None:
        return wanted or MAX_NEW_TOKENS
    room = positions - prompt_tokens
    if room < (wanted or 1):
        raise OctavoError(
            f"the model holds {positions} tokens, expected room for the prompt's {prompt_tokens} and {wanted or 1} new "
            "ones; shorten the prompt or ask for fewer"
        )
    return wanted or min(MAX_NEW_TOKENS, room)


class _CompiledLoop:
    """Replaces the loop over tokens in transformers' `generate` (its `custom_generate`), which prepares the
    arguments."""

    def __init__(self, streamer: _Streamer, compiling: contextlib.AbstractContextManager[Any]) -> None:
        self.compile_s = 0.0
        self._streamer = streamer
        self._compiling = compiling

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        # Here, and not above: it loads torch's compiler, for which a model that is not compiled need not wait.
        from octavo.integrations.compiled import CompiledModel, TokenChoice

        length = generation_config.max_length
        start = time.perf_counter()
        choose = TokenChoice(input_ids, length, logits_processor, sample=generation_config.do_sample)
        with self._compiling:
            compiled = CompiledModel(model, length, choose)
            compiled.compile(input_ids)
        self.compile_s = time.perf_counter() - start
        ids = input_ids.cpu()
        token = compiled.prefill(input_ids)
        while True:
            ids = torch.cat([ids, token.cpu()], dim=1)
            self._streamer.put(ids[:, -1])
            if stopping_criteria(ids, None).all():
                break
            choose.note(token, ids.shape[1] - 1)
            token = compiled.decode(token)
        self._streamer.end()
        return ids


def _inputs(tokenizer: Any, prompt: str, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as error:  # what it raises is the template's own affair
        raise OctavoError(
            f"the tokenizer's chat template cannot be used: {broken_template(error) or repr(error)}; mend it (it is in "
            "chat_template.jinja or tokenizer_config.json), or feed the prompt as it is: --raw, in Python raw=True"
        ) from error


class _Streamer(transformers.TextStreamer):
    """Passes on each piece of text, and records the time of each token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._awaits_prompt = True
        self.times: list[float] = []
        self.pieces: list[str] = []

    def put(self, value: Tensor) -> None:
        if self._awaits_prompt:
            self._awaits_prompt = False
        else:
            self.times += [time.perf_counter()] * value.numel()  # of guesses that were right several come at once
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self._on_text(text)
