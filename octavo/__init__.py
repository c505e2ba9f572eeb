"""Octavo folds any PyTorch model to eight bits: half the memory of bf16, with the accuracy measured and shown.

    report = octavo.quantize(model, "w8a16")      in place; what became int8, what did not, and why
    octavo.save(model, "out/")                    safetensors in the compressed-tensors layout
    model = octavo.load("out/")                   runs int8 as it lies on disk
"""

from octavo.coverage import Coverage, coverage
from octavo.errors import CheckpointError, MissingExtra, OctavoError, OctavoWarning, QuantizeError, RecipeError
from octavo.formats import save
from octavo.integrations.hub import load, quantize_checkpoint
from octavo.ops import backends
from octavo.quantize import quantize
from octavo.recipe import Recipe, Scheme, WeightArgs

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Coverage",
    "MissingExtra",
    "OctavoError",
    "OctavoWarning",
    "QuantizeError",
    "Recipe",
    "RecipeError",
    "Scheme",
    "WeightArgs",
    "backends",
    "coverage",
    "load",
    "quantize",
    "quantize_checkpoint",
    "save",
]
