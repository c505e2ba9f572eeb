"""Every model type of transformers, small and as int8: does it compute what its codes say, and does it come back?"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import octavo
from bench.each_type import build, in_processes, model_types, output
from octavo.computed_weights import computes_in_forward
from octavo.evaluate import sqnr
from octavo.experts import spec_of
from octavo.formats.checkpoint import CheckpointReader
from octavo.layers import kind_of
from octavo.modules import QuantModule
from octavo.primitives import dequantize
from octavo.quantization.plan import output_heads
from octavo.tables import Table

TITLE = "Every architecture of transformers"
HOW = """
Each model type that transformers knows, of language, vision, audio and what joins them, built small with random
weights: sizes are reduced in the arguments of its configuration. Types whose sizes do not fit each other then, or
that stay above 200 million parameters, are left out. `w8a16`, embeddings, output head and all convolutions
included. "Computes what its
codes say": on random inputs the int8 model agrees to 80 dB or more with the float one whose weights are codes times
scales, or, where numbers are too small for that, is no further from it in float64 than it is itself in fp32; not
asked of types that random inputs do not fit, or that answer in two ways if they are asked twice. "Smoothed": the
float model, calibrated on those inputs and smoothed with an alpha of 0.5, gives the same bits as before, where
anything was folded. "Comes back": `octavo.save`, then `octavo.load` gives every tensor bit for bit, also into a model
that was built by hand; asked of types that transformers itself loads as it saved them. "From file to file":
`octavo.quantize_checkpoint` makes of the float model's files the same tensors as `octavo.save` writes. "While it is
loaded": `from_pretrained` of transformers with an `OctavoConfig` gives every tensor bit for bit, too.
"""


def measure() -> dict[str, Any]:
    return {"types": in_processes(judge, model_types())}


def judge(name: str, mapping: str) -> dict[str, Any]:
    """The results for one model type: the questions of `HOW`, answered True or False where they apply."""
    found: dict[str, Any] = {"type": name, "class": None, "errors": {}}
    model, inputs = build(name, mapping)
    if model is None:
        return found
    found |= {"class": type(model).__name__, "parameters": sum(each.numel() for each in model.parameters())}
    int8 = copy.deepcopy(model)
    include = ["Embedding"] if any(type(module) is nn.Embedding for module in int8.modules()) else []
    include += ["OutputHead"] if output_heads(int8) else []
    include += [name for name, module in int8.named_modules() if isinstance(module, nn.modules.conv._ConvNd)]
    try:
        report = octavo.quantize(int8, "w8a16", include=include)
        found["quantized"], found["unasked"] = report.quantized_fraction, report.unasked_fraction
    except Exception as error:
        found["errors"]["quantize"] = repr(error)[:300]
        return found
    questions: dict[str, Callable[[], bool | None]] = {}
    if inputs is not None and torch.equal(output(model, inputs), output(model, inputs)):
        questions["computes"] = lambda: _computes(model, int8, inputs)
        questions["smoothed"] = lambda: _smoothed(model, inputs)
    config = copy.deepcopy(model.config)  # saving makes the dtype in it a word, which some classes do not understand
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if _is_kept_by_transformers(model):
            questions |= _of_files(type(model), config, int8, include)
        for question, ask in questions.items():
            try:
                found[question] = ask()
            except Exception as error:
                found["errors"][question] = repr(error)[:300]
    return found


def _computes(model: nn.Module, int8: nn.Module, inputs: dict[str, Tensor]) -> bool:
    wide = widened(model, int8)
    expected, got = output(wide, inputs), output(int8, inputs)
    if sqnr(expected, got) >= 80:
        return True
    floats = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = output(wide.double(), floats)
    return sqnr(exact, got) >= sqnr(exact, expected)


def _smoothed(model: nn.Module, inputs: dict[str, Tensor]) -> bool | None:
    """None where there is nothing to smooth."""
    smoothed = copy.deepcopy(model)
    report = octavo.smooth(smoothed, octavo.calibrate(smoothed, [inputs]), alpha=0.5)
    if not any(pair.reason is None for pair in report.pairs):
        return None
    return torch.equal(output(smoothed, inputs), output(model, inputs))


def widened(model: nn.Module, int8: nn.Module) -> nn.Module:
    """A copy of the float model with the dequantized weights of `int8`."""
    wide = copy.deepcopy(model)
    layers = dict(wide.named_modules())
    for name, quantized in int8.named_modules():
        for param, (codes, scale) in quantized.codes().items() if isinstance(quantized, QuantModule) else ():
            layer = layers[name]
            if computes_in_forward(layer):
                layer.forward = partial(_with_weight, layer.forward, _weight(codes.flatten(1), scale).view(codes.shape))
                continue
            weight = attrgetter(param)(layer).data
            _rows(layer, param, weight).copy_(_weight(codes, scale))
            if parametrize.is_parametrized(layer, param):  # it was computed
                setattr(layer, param, weight)
    return wide


class _Handed(TorchFunctionMode):
    """Convolutions are handed `weight` in place of what their layer computes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            args = (args[0], self.weight.to(args[0].dtype), *args[2:])
        return func(*args, **(kwargs or {}))


def _with_weight(forward: Callable[..., Tensor], weight: Tensor, x: Tensor) -> Tensor:
    with _Handed(weight):
        return forward(x)


def _rows(layer: nn.Module, param: str, weight: Tensor) -> Tensor:
    """A weight as its codes lie: output channels first."""
    spec, kind = spec_of(layer), kind_of(layer)
    assert kind is not None
    return spec.rows(param, weight) if spec is not None else kind.rows(weight, layer)


def _weight(codes: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 3:  # of experts
        return dequantize(codes.flatten(0, 1), scale.flatten(0, 1)).view(codes.shape)
    return dequantize(codes, scale)


def _is_kept_by_transformers(model: Any) -> bool:
    """Whether the float model, saved in "float", comes back without octavo."""
    try:
        model.save_pretrained("float")
        _, info = type(model).from_pretrained("float", output_loading_info=True)
    except Exception:
        return False
    return not info["missing_keys"] and not info["mismatched_keys"]


def _of_files(cls: Any, config: Any, int8: nn.Module, include: list[str]) -> dict[str, Callable[[], bool]]:
    def loaded(**options: Any) -> bool:
        return _same(octavo.load("int8", **options).state_dict(), int8.state_dict())

    def saved() -> bool:
        octavo.save(int8, "int8")
        return True

    def streamed() -> bool:
        octavo.quantize_checkpoint("float", "streamed", "w8a16", include=include)
        return _same(_tensors("streamed"), _tensors("int8"))

    def while_loading() -> bool:
        from octavo.integrations.transformers import OctavoConfig

        quantizing = OctavoConfig("w8a16", include=include)
        return _same(cls.from_pretrained("float", quantization_config=quantizing).state_dict(), int8.state_dict())

    return {
        "saved": saved,
        "loaded": loaded,
        "loaded_by_hand": lambda: loaded(model=cls(config).eval()),
        "streamed": streamed,
        "while_loading": while_loading,
    }


def _tensors(folder: str) -> dict[str, Tensor]:
    with CheckpointReader(Path(folder)) as reader:
        return {name: reader.tensor(name).clone() for name in reader.names}


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


QUESTIONS = {
    "computes": "computes what its codes say",
    "smoothed": "smoothed, answers with the same bits",
    "loaded": "comes back, built by transformers",
    "loaded_by_hand": "comes back, built by hand",
    "streamed": "from file to file the same",
    "while_loading": "quantized while it is loaded, the same",
}


def tables(found: dict[str, Any]) -> list[Table]:
    types = found["types"]
    built = [one for one in types if one["class"]]
    rows = [("model types", str(len(types)), "", ""), ("built small", str(len(built)), "", "")]
    for question, said in QUESTIONS.items():
        asked = [one for one in built if one.get(question) is not None or question in one["errors"]]
        yes = [one for one in asked if one.get(question) is True]
        if asked:
            rows.append((said, str(len(asked)), str(len(yes)), str(len(asked) - len(yes))))
    wrong = [
        (one["type"], QUESTIONS.get(question, question), one["errors"].get(question, "another answer"))
        for one in types
        for question in (*QUESTIONS, "quantize", "saved", "process")
        if question in one["errors"] or one.get(question) is False
    ]
    return [
        Table("", ("", "asked of", "yes", "no"), tuple(rows), "lrrr"),
        Table("What did not hold", ("model type", "what", "why"), tuple(wrong), "lll"),
    ]
