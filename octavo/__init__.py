"""Octavo folds any PyTorch model to eight bits: half the memory of bf16, with the accuracy measured and shown.

    report = octavo.quantize(model, "w8a16")      in place; what became int8, what did not, and why
    octavo.save(model, "out/")                    safetensors in the compressed-tensors layout
    model = octavo.load("out/")                   runs int8 as it lies on disk

Int8 activations take three steps, from the float model, in the place of the first:

    stats = octavo.calibrate(model, batches)      the ranges of the layers' inputs
    octavo.smooth(model, stats, alpha="auto")     outliers moved into the weights, the function preserved
    octavo.quantize(model, "w8a8")

The names are loaded when they are first used (PEP 562), so that the command line answers before torch is there. A
program exported with int8 layers needs only their ops: `import octavo.ops`, then `torch.export.load`.
"""

# ruff: noqa: F403, F405 -- what api.py names is checked by a test, and only type checkers read this import

import typing

if typing.TYPE_CHECKING:
    from octavo.api import *

__version__ = "0.1.0"

__all__ = [
    "CalibrateError",
    "CheckpointError",
    "Comparison",
    "Coverage",
    "EvaluateError",
    "InputArgs",
    "MissingExtra",
    "OctavoError",
    "OctavoWarning",
    "QuantizeError",
    "Recipe",
    "RecipeError",
    "Scheme",
    "SmoothReport",
    "Stats",
    "WeightArgs",
    "backends",
    "calibrate",
    "compare",
    "coverage",
    "load",
    "perplexity",
    "quantize",
    "quantize_checkpoint",
    "register_experts",
    "save",
    "smooth",
    "sqnr",
]


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    from octavo import api

    value = getattr(api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
