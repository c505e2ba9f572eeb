"""A whole model, every int8 op of it answered by the Triton kernels, next to the same model on the reference's."""

from __future__ import annotations

import pytest
import torch

import octavo
from octavo import ops
from octavo.ops import dispatch, native
from octavo.ops import triton as kernels
from tests import tiny_models as tiny

CALLED_AS = {
    "w8a16_linear": "_linear",
    "w8a16_embedding": "_embedding",
    "quantize_per_token": "_per_token",
    "w8a8_linear": "_w8a8_linear",
    "w8a16_experts_linear": "_experts_linear",
    "w8a8_experts_linear": "_int8_experts_linear",
}
"""Op -> what its wrapper in `octavo.ops` calls."""


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
@pytest.mark.parametrize("make", [tiny.tied_llama, tiny.mixtral])
def test_a_model_on_triton_computes_what_it_does_on_the_cpu(
    make: object, scheme: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(make)  # type: ignore[arg-type]
    octavo.quantize(model, scheme, include=["Embedding", "OutputHead"])
    ids = tiny.tokens(1, 3)
    with torch.no_grad():
        expected = model(ids).logits
        served = set()
        for op, name in CALLED_AS.items():
            function = kernels.OPS[op]()

            def serve(*args: object, op: str = op, function: object = function) -> object:
                served.add(op)
                return function(*args)  # type: ignore[operator]

            monkeypatch.setattr(ops, name, serve)
        monkeypatch.setattr(dispatch, "native_kernels", native.Native(None, "a GPU answers"))
        found = model.to(device)(ids.to(device)).logits.cpu()
    experts = {f"{scheme}_experts_linear"} if make is tiny.mixtral else set()
    assert {"w8a16_embedding", f"{scheme}_linear", *experts} <= served
    assert octavo.sqnr(expected, found) > 60
