"""What `octavo.NAME` stands for: the public names, each from the file that it lives in."""

from __future__ import annotations

from octavo.calibration.calibrate import calibrate as calibrate
from octavo.calibration.stats import Stats as Stats
from octavo.errors import CalibrateError as CalibrateError
from octavo.errors import CheckpointError as CheckpointError
from octavo.errors import EvaluateError as EvaluateError
from octavo.errors import MissingExtra as MissingExtra
from octavo.errors import OctavoError as OctavoError
from octavo.errors import OctavoWarning as OctavoWarning
from octavo.errors import QuantizeError as QuantizeError
from octavo.errors import RecipeError as RecipeError
from octavo.evaluate import compare as compare
from octavo.evaluate import perplexity as perplexity
from octavo.evaluate import sqnr as sqnr
from octavo.experts import register_experts as register_experts
from octavo.integrations.hub import load as load
from octavo.integrations.hub import quantize as quantize
from octavo.integrations.hub import quantize_checkpoint as quantize_checkpoint
from octavo.integrations.hub import save as save
from octavo.ops import backends as backends
from octavo.quantization.coverage import Coverage as Coverage
from octavo.quantization.coverage import coverage as coverage
from octavo.recipe import InputArgs as InputArgs
from octavo.recipe import Recipe as Recipe
from octavo.recipe import Scheme as Scheme
from octavo.recipe import WeightArgs as WeightArgs
from octavo.report import Comparison as Comparison
from octavo.report import SmoothReport as SmoothReport
from octavo.smoothing.smooth import smooth as smooth
