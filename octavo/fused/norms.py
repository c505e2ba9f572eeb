"""RMS norms in one or two kernels instead of eight.

    y = weight * x / sqrt(mean(x^2) + eps)      x [..., K], weight [K]      https://arxiv.org/abs/1910.07467

A model's class spells this out: to fp32, square, mean, + eps, rsqrt, times x, round, times weight. In eager PyTorch
each of these is a kernel, which on a GPU takes longer to launch than to run, and on a CPU a pass over memory; torch has
one op for most of it, which is one kernel on a GPU (on CPUs it goes the same steps), and where this package has a
kernel and nobody wants a gradient (`ops.rms_norm`), that does all. Classes differ in where they round what they
computed in fp32:

    rounding    y                                                    as in
    "x"         weight * (x / rms rounded to x's dtype)              Llama, Qwen, Mistral
    "weight"    weight * (x / rms rounded to weight's dtype)         T5
    "last"      (weight * x / rms) rounded to x's dtype              OLMo 2, gpt-oss

Whether a module is one of them is asked of the module itself, whatever its class is called: a copy of it is run on
random inputs, and has to give the same bits as the formula on a CPU. One that does not is left alone.
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


# `.to` does nothing outside of autocast, which on GPUs has torch's op give fp32.
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

    It has the other norm's weight and plain attributes, for code that reads those. (transformers knows by "RMSNorm" in
    the name of the class that a weight which a file lacks is to be 1.)

    weight: [K] float.
    rounding: where the result is rounded, a key of the table in this file's head.
    eps_name: the attribute that is eps.
    """

    weight: nn.Parameter

    def __init__(self, norm: nn.Module, rounding: str, eps_name: str) -> None:
        super().__init__()
        share_contents(self, norm)
        self._rounding, self._eps_name = rounding, eps_name

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """x [..., K] float -> [..., K]; x may have whatever name it had in the other norm."""
        (x,) = (*args, *kwargs.values())
        eps: float = getattr(self, self._eps_name)
        y = ops.rms_norm(x, self.weight, eps, round_first=self._rounding != "last")
        return _FORMULAS[self._rounding](x, self.weight, eps) if y is None else y

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self._eps_name}={getattr(self, self._eps_name)}, rounding={self._rounding!r}"


def fused_norms(model: nn.Module) -> dict[str, FusedRMSNorm]:
    """What can stand for RMS norms of `model`, which is not modified and may be on `meta`: module name -> its stand-in.

    A norm is recognized if it holds a weight [K] and plain values only, takes one argument, and gives the bits of one
    of the formulas, one of its float attributes taken for eps, whatever the dtypes of x and weight.
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
    """The rounding of a candidate and the name of its eps; None if it is no RMS norm of a kind that is known."""
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
    """Inputs x, weights, and what a copy of `norm` makes of them.

    Raises: ValueError if it wants more than x, or changes x or itself; whatever the norm raises.
    """
    if not takes_one_argument(norm):
        raise ValueError("it takes more than one argument")
    probe = copy.copy(norm)
    generator = torch.Generator("cpu").manual_seed(0)
    k = len(norm.get_parameter("weight"))
    # From where eps is larger than the mean square, so that another eps is noticed, to where it is lost in it.
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
