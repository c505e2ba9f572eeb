"""A causal language model, float or int8, compiled whole and with a static key-value cache: what gpt-fast does by hand.

    compiled = CompiledModel(model, length=576)
    compiled.compile(prompt)
    token = compiled.prefill(prompt)       [1, T] -> [1, 1]
    token = compiled.decode(token)         [1, 1] -> [1, 1]

Two functions are compiled, each into one graph (`fullgraph=True`): prefill, once for prompts of all lengths, and
decode, for one token. The position at which keys and values are written is kept in the cache, on the device, and so is
the token: no step waits for the CPU. On CUDA devices decode is recorded as a CUDA graph, so that a step is one launch.

The caches of all layers have the full length; a sliding window is expressed by the mask. (transformers' own static
sliding windows count tokens in Python, so that a compiler would see a different program at each token.)
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    EpsilonLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from octavo.errors import OctavoError
from octavo.integrations.equal_calls import EqualCalls
from octavo.integrations.language_model import cache_name, has_key_value_cache, last_logits_only
from octavo.integrations.side_by_side import SideBySide

__all__ = ["CompiledModel", "TokenChoice", "likeliest"]

_WITHOUT = "leave out --compile (in Python: call the model itself), which runs it eagerly"

_FIRST_STEPS = 3
"""Steps of decode run while compiling. With CUDA graphs the first runs the kernels, the second records, the third
replays."""


def likeliest(logits: Tensor) -> Tensor:
    """Greedy choice: logits [1, V] -> token [1, 1]."""
    return logits.argmax(-1, keepdim=True)


_PROCESSORS = (
    EpsilonLogitsWarper, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip
"""transformers' processors that depend on the scores and on which tokens occurred, but not on where or how often."""


class TokenChoice:
    """How transformers' `generate` chooses a token, with tensors of fixed sizes only.

    prompt: int64 [1, T]. length: of prompt and continuation. processors: of scores, as a model's generation config
    asks for them. sample: draw a token; otherwise take the likeliest.
    Raises: OctavoError for a processor that cannot be compiled.
    """

    def __init__(self, prompt: Tensor, length: int, processors: Sequence[LogitsProcessor], *, sample: bool) -> None:
        for processor in processors:
            if not isinstance(processor, _PROCESSORS):
                raise OctavoError(
                    f"the model's generation config asks for {type(processor).__name__}, which is not for compiled "
                    f"generation; {_WITHOUT}"
                )
        self._processors = list(processors)
        self._sample = sample
        # Of fixed length: places without a token yet repeat the first one.
        self._tokens = prompt[:, :1].repeat(1, length)
        self._tokens[:, : prompt.shape[1]] = prompt

    def note(self, token: Tensor, position: int) -> None:
        """`token` [1, 1] is now at `position`."""
        if self._processors:
            self._tokens[:, position : position + 1] = token

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [1, V] -> token [1, 1]."""
        scores = logits.float()
        for processor in self._processors:
            scores = processor(self._tokens, scores)
        if not self._sample:
            return likeliest(scores)
        # argmax of p / Exp(1) draws from p, as torch.multinomial does, but without waiting for the device.
        chances = scores.softmax(-1)
        return likeliest(chances / torch.empty_like(chances).exponential_())


class CompiledModel:
    """Prefill and decode of one sequence at a time. The model must not change from now on.

    model: a causal language model of transformers, float or int8, in eval mode.
    length: tokens of prompt and continuation together, at most.
    choose: logits [1, V] of the model's dtype -> token int64 [1, 1]; compiled along with the model.
    Raises: OctavoError if the model has no key-value cache that can be static.
    """

    def __init__(self, model: Any, length: int, choose: Callable[[Tensor], Tensor] = likeliest) -> None:
        self._name = type(model).__name__
        self._device = model.device
        argument, self._cache = _static_cache(model, length)
        options: dict[str, Any] = {argument: self._cache, **last_logits_only(model)}

        def step(tokens: Tensor) -> Tensor:
            output = model(input_ids=tokens, use_cache=True, **options)
            return choose(output.logits[:, -1])

        self._on_cuda = self._device.type == "cuda"
        for_all: dict[str, Any] = {
            "post_grad_custom_pre_pass": EqualCalls(),
            "guard_filter_fn": _guards_but_of_buffers(model),
        }
        for_decode: dict[str, Any] = {
            "post_grad_custom_post_pass": SideBySide(),
            "triton.cudagraphs": self._on_cuda,
            "size_asserts": False,  # hundreds of comparisons for each token, of sizes that never change
        }

        def compiled(**options: Any) -> Callable[[Tensor], Tensor]:  # torch keeps the dict, and takes from it
            return torch.compile(_with_own_code(step), fullgraph=True, dynamic=False, options=options)

        self._prefill, self._decode = compiled(**for_all), compiled(**for_all, **for_decode)
        self._length = length
        self._held = 1  # tokens in the cache: the one that `_static_cache` ran
        self._guarded = True

    def compile(self, prompt: Tensor) -> None:
        """Compile, by running prefill and the first steps of decode. A sequence in progress is lost.

        prompt: int64 [1, T]; afterwards prompts of any other length need no compiling either.
        Raises: OctavoError that says what could not be compiled.
        """
        devices = [self._device] if self._on_cuda else []
        with torch.random.fork_rng(devices), self._compiling():
            token = self.prefill(prompt)
            steps = min(_FIRST_STEPS, self._length - prompt.shape[1])
            for step in range(steps):
                # Fail if the program differs from one token to the next: it would be compiled anew at each.
                with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                    token = self.decode(token)
            self._guarded = steps < _FIRST_STEPS
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def prefill(self, prompt: Tensor) -> Tensor:
        """Begin a new sequence. prompt: int64 [1, T] on the model's device. Returns: the token after it, [1, 1].
        Raises: OctavoError if it is longer than `length`; the sequence that was begun can go on then."""
        tokens = prompt.shape[1]
        self._check_room(tokens)
        self._cache.reset()
        self._held = 0
        if tokens == 1:
            return self.decode(prompt.clone())  # a tensor of inference mode, as every later token is
        self._held = tokens
        torch._dynamo.maybe_mark_dynamic(prompt, 1)
        return self._prefill(prompt)

    # Not no_grad, under which each op of octavo would still ask autograd, in Python, for a gradient.
    @torch.inference_mode()
    def decode(self, token: Tensor) -> Tensor:
        """Feed one token, int64 [1, 1]. Returns: the one after it, [1, 1].
        Raises: OctavoError if the cache is full."""
        self._check_room(self._held + 1)
        self._held += 1
        if self._on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        # Guards compare hundreds of attributes of the model at each token, to see whether it changed. `_unguarded`
        # skips them, except those of tensors, most of which `_guards_but_of_buffers` removes.
        with contextlib.nullcontext() if self._guarded else _unguarded():
            token = self._decode(token)
        # A CUDA graph writes the next token to the same place.
        return token.clone() if self._on_cuda else token

    # The cache's own count is on the device, where a token past the end fails an assertion that ends the process.
    def _check_room(self, tokens: int) -> None:
        if tokens > self._length:
            raise OctavoError(
                f"length: is {self._length}, expected room for prompt and continuation, which are {tokens} tokens by "
                "now; make a CompiledModel of greater length, or begin a new sequence (prefill)"
            )

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        try:
            yield
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise OctavoError(f"{self._name} cannot be compiled: {_first_lines(error)}; {_WITHOUT}") from error
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            raise OctavoError(
                f"{self._name} cannot be compiled once: its step is another program at each token; {_WITHOUT}"
            ) from error


def _guards_but_of_buffers(model: Any) -> Callable[[Sequence[Any]], list[bool]]:
    """A filter for the compiler's guards that removes those on the model's buffers (codes and scales), which must not
    change. (Guards on parameters are skipped by `_unguarded`.)"""
    own = set(map(id, model.buffers()))
    return lambda guards: [not (g.guard_type == "TENSOR_MATCH" and g.has_value and id(g.value) in own) for g in guards]


def _unguarded() -> contextlib.AbstractContextManager[Any]:
    return torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)


def _with_own_code(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A copy of `function` with its own code object, to which torch attaches what it compiled: models must not share
    it."""
    code, name = function.__code__.replace(), function.__name__
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def _static_cache(model: Any, length: int) -> tuple[str, Cache]:
    """The argument of the model's forward that takes a cache, and an empty one for `length` tokens, with its
    tensors allocated."""
    name = type(model).__name__
    argument = cache_name(model)
    if argument is None or not has_key_value_cache(model):
        raise OctavoError(f"{name} keeps its state in no key-value cache, and that cannot be static; {_WITHOUT}")
    try:
        layers = StaticCache(config=model.config, max_cache_len=length).layers
    except KeyError as error:
        raise OctavoError(f"{name} has layers of type {error}, whose cache cannot be static; {_WITHOUT}") from error
    cache = Cache(
        [StaticLayer(max_cache_len=length) if type(layer) is StaticSlidingWindowLayer else layer for layer in layers]
    )
    if not cache.is_compileable:
        others = sorted({type(layer).__name__ for layer in layers if not layer.is_compileable})
        raise OctavoError(f"{name} has caches that cannot be compiled ({', '.join(others)}); {_WITHOUT}")
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    try:
        # One token, eagerly: only the model knows the shapes of its keys and values.
        with torch.no_grad():
            model(input_ids=token, use_cache=True, **{argument: cache})
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise OctavoError(f"{name} does not run with a static cache ({error}); {_WITHOUT}") from error
    return argument, cache


def _first_lines(error: BaseException) -> str:
    """The first lines of an error's message, without the part for developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:500]
