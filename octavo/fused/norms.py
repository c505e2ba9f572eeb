"""RMS norms computed by one or two kernels instead of eight.

    y = weight * x / sqrt(mean(x^2) + eps)      x [..., K], weight [K]      https://arxiv.org/abs/1910.07467

The classes of models spell this out: cast to fp32, square, mean, + eps, rsqrt, times x, round, times weight. In eager
PyTorch each step is a kernel: on a GPU it takes longer to launch than to run, on a CPU it is a pass over memory.
`ops.rms_norm` is one kernel for everything, where there is one and no gradient is wanted. Elsewhere torch's own
`F.rms_norm` replaces most of the steps (by one kernel on GPUs). Classes differ in where they round from fp32:

    rounding    y                                                    as in
    "x"         weight * (x / rms rounded to x's dtype)              Llama, Qwen, Mistral
    "weight"    weight * (x / rms rounded to weight's dtype)         T5
    "last"      (weight * x / rms) rounded to x's dtype              OLMo 2, gpt-oss

An RMS norm is recognized by what it computes, whatever its class is called: a copy of it is run on random inputs on a
CPU, and has to return the same bits as one of these formulas. Other modules are left alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import ops
from octavo.stand_ins import (
    FLOATS,
    attributes,
    has_hooks,
    is_plain_value,
    random,
    same_bits,
    share_contents,
    takes_one_argument,
)

__all__ = ["FusedRMSNorm", "fused_norms"]


# The last `.to` matters under autocast only: torch's op then returns fp32 on GPUs.
def _round_to_x(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * F.rms_norm(x, weight.shape, None, eps).to(x.dtype)


def _round_to_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, weight.dtype)
    return weight * F.rms_norm(x.to(wide), weight.shape, None, eps).to(weight.dtype)


def _round_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


_FORMULAS = {"x": _round_to_x, "weight": _round_to_weight, "last": _round_last}


class FusedRMSNorm(nn.Module):
    """An RMS norm over the last dimension by one kernel of this package, or by torch's own op.

    It has the weight and the attributes of the original norm, for code that reads them. (The class name has to contain
    "RMSNorm": transformers then initializes a weight that is missing in the files to 1.)

    weight: [K] float.
    rounding: where the result is rounded, a key of the table at the head of this file.
    eps_name: name of the attribute that holds eps.
    """

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, rounding: str, eps_name: str) -> None:
        super().__init__()
        share_contents(self, norm)
        self._rounding, self._eps_name = rounding, eps_name

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """x [..., K] float -> [..., K]; x may be passed under the name that it has in the original norm."""
        (x,) = (*args, *kwargs.values())
        eps: float = getattr(self, self._eps_name)
        y = ops.rms_norm(x, self.weight, eps, round_first=self._rounding != "last")
        return _FORMULAS[self._rounding](x, self.weight, eps) if y is None else y

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self._eps_name}={getattr(self, self._eps_name)}, rounding={self._rounding!r}"


def fused_norms(model: nn.Module) -> dict[str, FusedRMSNorm]:
    """Stand-ins for the RMS norms of `model`: module name -> stand-in. `model` is not modified, and may be on `meta`.

    An RMS norm takes one argument, holds only a weight [K] and plain values, and returns the bits of one of the
    formulas with one of its float attributes as eps, for all dtypes of x and weight.
    """
    found: dict[str, FusedRMSNorm] = {}
    known: dict[object, tuple[str, str] | None] = {}
    for name, module in model.named_modules():
        if _is_candidate(module):
            alike = (type(module), len(module.get_parameter("weight")), *attributes(module).items())
            if alike not in known:
                known[alike] = _recognize(module)
            if rule := known[alike]:
                found[name] = FusedRMSNorm(module, *rule)
    return found


def _is_candidate(module: nn.Module) -> bool:
    """Whether a module holds a weight [K] and plain values, and nothing else: no children, buffers or hooks."""
    if isinstance(module, (nn.RMSNorm, FusedRMSNorm)) or list(module._parameters.keys()) != ["weight"]:
        return False
    weight = module._parameters["weight"]
    return (
        # A weight with one entry could be a scale for any number of columns.
        (type(weight) is nn.Parameter and weight.dim() == 1 and len(weight) > 1 and weight.dtype in FLOATS)
        and all(map(is_plain_value, attributes(module).values()))
        and not module._modules
        and not has_hooks(module)
    )


def _recognize(norm: nn.Module) -> tuple[str, str] | None:
    """(rounding, name of the eps attribute) of a candidate; None if it computes none of the formulas."""
    epsilons = [(name, value) for name, value in attributes(norm).items() if isinstance(value, float)]
    if not epsilons:
        return None
    try:
        samples = list(_samples(norm))
    except Exception:  # whatever it wants, it is not what an RMS norm is given
        return None
    for (rounding, formula), (name, eps) in itertools.product(_FORMULAS.items(), epsilons):
        if all(same_bits(formula(x, weight, eps), y) for x, weight, y in samples):
            return rounding, name
    return None


def _samples(norm: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs x, weights, and what a copy of `norm` returns for them.

    Raises: ValueError if it takes more than x, or changes x or itself; whatever the norm raises.
    """
    if not takes_one_argument(norm):
        raise ValueError("it takes more than one argument")
    probe = copy.copy(norm)
    generator = torch.Generator("cpu").manual_seed(0)
    k = len(norm.get_parameter("weight"))
    # From sizes at which eps is larger than the mean square, so that a wrong eps is noticed, to where it is negligible.
    sizes = torch.logspace(-5, 3, 12, device="cpu", dtype=torch.float32).unsqueeze(1)
    for x_dtype, weight_dtype in itertools.product(FLOATS, repeat=2):
        rows = (random(12, k, generator=generator) * sizes).to(x_dtype)
        weight = nn.Parameter(random(k, generator=generator).to(weight_dtype), requires_grad=False)
        vars(probe)["_parameters"] = {"weight": weight}
        for shape, training in itertools.product(((12, k), (3, 4, k), (2, 3, 2, k)), (False, True)):
            x = rows.view(shape)
            given = x.clone()
            with torch.no_grad():
                y = probe.train(training)(given)
            if not torch.equal(given, x) or attributes(probe) != attributes(norm):
                raise ValueError("it changes more than its output")
            yield x, weight.data, y
