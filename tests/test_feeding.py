"""A model is fed what the batch holds, on its own device, and may do with it what it likes."""

from __future__ import annotations

import threading
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from octavo.errors import EvaluateError
from octavo.feeding import check_callable, feed, on_tensors

META = torch.device("meta")


class Pair(NamedTuple):
    first: Tensor
    second: Any


class States:
    """As a key-value cache: a plain object, in which the model keeps what it has seen."""

    def __init__(self, *seen: Tensor) -> None:
        self.seen = list(seen)


class Encoded(OrderedDict[str, Tensor]):
    """As transformers' outputs, which an encoder-decoder can be given back."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self["last_hidden_state"]


def given(*args: Any, **kwargs: Any) -> Any:
    return (*args, *kwargs.values())


def test_what_a_model_writes_into_a_batch_is_not_seen_by_the_next() -> None:
    def model(x: Tensor, states: States, by_name: dict[str, Tensor]) -> Tensor:
        states.seen.append(x)
        by_name.clear()
        return x.add_(len(states.seen))

    x, states, by_name = torch.zeros(2), States(torch.ones(2)), {"y": torch.ones(2)}
    for batch in ((x, states, by_name), {"x": x, "states": states, "by_name": by_name}):
        assert torch.equal(feed(model, batch, None, "the model"), torch.full((2,), 2.0))
    assert torch.equal(x, torch.zeros(2)) and len(states.seen) == 1 and by_name


@pytest.mark.parametrize(
    "batch",
    [
        Pair(torch.ones(2), 3),
        [torch.ones(2), 3],
        {"x": torch.ones(2), "flag": 3},
        UserDict(x=torch.ones(2), flag=3),
        {"x": Pair(torch.ones(2), 3)},
        {"x": Encoded(last_hidden_state=torch.ones(2))},
        {"states": States(torch.ones(2))},
        (torch.ones(2, requires_grad=True) * 2,),
    ],
)
def test_whatever_holds_a_tensor_it_is_moved(batch: Any) -> None:
    (first, *others) = feed(given, batch, META, "the model")
    tensor = first
    if isinstance(first, Pair):
        tensor, others = first.first, [first.second]
    if isinstance(first, Encoded):
        tensor = first.last_hidden_state
    if isinstance(first, States):
        (tensor,) = first.seen
    assert tensor.device == META and others in ([], [3])


def test_one_tensor_stays_one() -> None:
    x = torch.ones(2)
    query, key, nested = feed(given, (x, x, {"value": [x]}), None, "the model")
    assert query is key is nested["value"][0] and query is not x


@pytest.mark.parametrize("requires_grad", [True, False])
def test_who_wants_gradients_still_does(requires_grad: bool) -> None:
    """Of an energy, the model itself takes the derivative by the positions."""
    (x,) = feed(given, torch.ones(2, requires_grad=requires_grad), None, "the model")
    assert x.requires_grad == requires_grad


def test_a_packed_sequence_is_one_argument() -> None:
    layer, packed = nn.LSTM(3, 2), pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    (found, _), (expected, _) = feed(layer, packed, torch.device("cpu"), "the model"), layer(packed)
    assert isinstance(found, PackedSequence) and torch.equal(found.data, expected.data)


def test_what_cannot_be_copied_is_given_itself() -> None:
    lock = threading.Lock()
    x, found = feed(given, {"x": torch.ones(2), "lock": lock}, META, "the model")
    assert x.device == META and found is lock


def test_a_generator_draws_the_same_each_time() -> None:
    batch = (torch.ones(2), torch.Generator().manual_seed(0))

    def model(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.rand(2, generator=generator)

    first = feed(model, batch, None, "the model")
    assert torch.equal(feed(model, batch, None, "the model"), first)


def test_tensors_are_replaced_where_they_are() -> None:
    batch = {"x": Pair(torch.ones(4, 2), [torch.zeros(4)]), "states": States(torch.ones(4)), "n": 4}
    short = on_tensors(batch, lambda tensor: tensor[:1])
    assert isinstance(short["x"], Pair) and short["x"].first.shape == (1, 2) and short["x"].second[0].shape == (1,)
    assert short["states"].seen[0].shape == (1,) and short["n"] == 4 and batch["states"].seen[0].shape == (4,)


@pytest.mark.parametrize(("model", "what"), [("out/", "a str"), (None, "a NoneType"), (nn.ReLU, "the class ReLU")])
def test_what_cannot_be_run_is_told_so(model: object, what: str) -> None:
    with pytest.raises(EvaluateError, match=rf"int8_model is {what}, expected a model: .* octavo\.load"):
        check_callable(model, "int8_model")


def test_a_model_may_be_a_function() -> None:
    check_callable(len, "model")


@pytest.mark.parametrize(
    ("batch", "given", "why"),
    [
        ([torch.ones(1, 4), torch.ones(1)], "2 positional arguments", "too many positional arguments"),
        ({"input": torch.ones(1), "labels": torch.ones(1)}, "the keywords input, labels", "unexpected keyword"),
        ((), "0 positional arguments", "missing a required argument: 'input'"),
    ],
)
def test_of_a_batch_with_labels_it_is_said_what_the_model_takes(batch: Any, given: str, why: str) -> None:
    with pytest.raises(EvaluateError, match=rf"batch 0: it was fed {given}, and takes \(input: .*{why}.*x for x, _ in"):
        feed(nn.Linear(4, 2), batch, None, "batch 0: it")


def test_an_error_within_the_model_is_its_own() -> None:
    def model(x: Tensor) -> Any:
        return x + object()  # type: ignore[operator]

    with pytest.raises(TypeError, match="unsupported operand"):
        feed(model, torch.ones(1), None, "it")
    with pytest.raises(TypeError, match="not iterable"):
        feed(max, (1,), None, "it")  # which has no signature
