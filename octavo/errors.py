"""The exceptions and warnings that octavo raises.

    OctavoError
      RecipeError      (ValueError)   a scheme, recipe or pattern that cannot be honoured
      QuantizeError    (ValueError)   a model or tensor that cannot be quantized as asked
      CheckpointError  (ValueError)   a file or folder that is missing, damaged or of another format
      EvaluateError    (ValueError)   batches that a model cannot be run on, outputs that cannot be judged
      CalibrateError   (ValueError)   activations or statistics that int8 inputs cannot be calibrated with
      MissingExtra     (ImportError)  an optional package is needed for what was asked

    OctavoWarning      (UserWarning)  the work was done, but not as well as one would expect

A message names the parameter or file, what was got, what was expected, and the fix.
"""

from __future__ import annotations

__all__ = [
    "CalibrateError",
    "CheckpointError",
    "EvaluateError",
    "MissingExtra",
    "OctavoError",
    "OctavoWarning",
    "QuantizeError",
    "RecipeError",
]


class OctavoError(Exception):
    """Base class: `except OctavoError` catches every user error of octavo."""


class RecipeError(OctavoError, ValueError):
    """A scheme, recipe or pattern that cannot be honoured."""


class QuantizeError(OctavoError, ValueError):
    """A model or tensor that cannot be quantized as asked."""


class CheckpointError(OctavoError, ValueError):
    """A file or folder that is missing, damaged or of another format."""


class EvaluateError(OctavoError, ValueError):
    """Batches that a model cannot be run on, outputs that cannot be judged."""


class CalibrateError(OctavoError, ValueError):
    """Activations or statistics that int8 inputs cannot be calibrated with."""


class MissingExtra(OctavoError, ImportError):
    """An optional package is needed for what was asked."""


class OctavoWarning(UserWarning):
    """The work was done, but not as well as one would expect."""
