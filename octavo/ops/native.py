"""Load the native CPU kernels (`csrc/`): one library that answers the ops on CPUs in place of the reference.

It holds kernels for several instruction sets, and uses the best one that the processor has, or none where the reference
is faster. OCTAVO_ISA (scalar, avx2, avxvnni, avx512, amx) chooses another one, OCTAVO_BACKEND=reference none.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from octavo.errors import OctavoError, QuantizeError

__all__ = ["ANY_NUMBER", "LIBRARY", "Native", "load", "reference_is_forced", "select"]

LIBRARY = Path(__file__).with_name("liboctavo.so")

ANY_NUMBER = 2**63 - 1
"""Means "for any number of rows" in `Native`; `kAnyNumber` in `csrc/kernels.h`."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The float dtypes in the order of `Float` in `csrc/kernels.h`."""


@dataclasses.dataclass(frozen=True)
class Native:
    """The kernels in use on CPUs.

    isa: the instruction set; None if the reference is used. why: why this one.
    convolves: whether there are kernels for convolutions (else the reference computes them).
    attends: whether there are kernels for int8 attention (else it is composed of other ops).
    attends_in: dtype -> the number of query rows per key head up to which float attention by a kernel is faster than
        torch's; 0 if there is no kernel.
    multiplies_in: dtype -> the number of rows up to which a float linear layer by a kernel is faster than torch's; 0 if
        there is no kernel.
    """

    isa: str | None
    why: str
    convolves: bool = False
    attends: bool = False
    attends_in: Mapping[torch.dtype, int] = dataclasses.field(default_factory=dict)
    multiplies_in: Mapping[torch.dtype, int] = dataclasses.field(default_factory=dict)


def reference_is_forced() -> bool:
    """Whether OCTAVO_BACKEND asks for the reference on every device. Raises: QuantizeError for an unknown value."""
    forced = os.environ.get("OCTAVO_BACKEND", "")
    if forced not in ("", "reference"):
        raise QuantizeError(f"OCTAVO_BACKEND is {forced!r}; expected 'reference' or nothing (the best that is there)")
    return bool(forced)


def load() -> Native:
    """Load the library and choose its kernels.

    Warns: if the library is missing, because int8 is slow then.
    Raises: QuantizeError if OCTAVO_BACKEND or OCTAVO_ISA has an unknown value, or one that this processor lacks;
        OctavoError if torch cannot load the library.
    """
    if reference_is_forced():
        return Native(None, "forced by OCTAVO_BACKEND")
    if not LIBRARY.is_file():
        why = f"the native kernels are not installed ({LIBRARY} is missing)"
        warnings.warn(
            f"octavo runs without its native kernels, and int8 is slow: {LIBRARY} is missing; to build it, install "
            "octavo from source with a C++ compiler and without OCTAVO_NO_NATIVE, or set OCTAVO_BACKEND=reference to "
            "say that this is meant",
            stacklevel=2,
        )
        return Native(None, why)
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise OctavoError(
            f"{LIBRARY}: torch {torch.__version__} cannot load the native kernels ({error}); install octavo anew next "
            "to this torch, or set OCTAVO_BACKEND=reference to run without them"
        ) from error
    return select(os.environ.get("OCTAVO_ISA", ""))


def select(isa: str) -> Native:
    """Use the kernels of an instruction set; with "" the best that this processor has. The library must be loaded.

    Raises: QuantizeError if `isa` is unknown, or this processor lacks it.
    """
    library = ctypes.CDLL(str(LIBRARY))
    library.octavo_select.restype = ctypes.c_char_p
    library.octavo_isa.restype = ctypes.c_char_p
    library.octavo_convolves.restype = library.octavo_attends.restype = ctypes.c_bool
    library.octavo_attends_in.restype = library.octavo_multiplies_in.restype = ctypes.c_int64
    error = ctypes.c_int()
    why = library.octavo_select(isa.encode(), ctypes.byref(error)).decode()
    if error:
        raise QuantizeError(why)
    name = library.octavo_isa()
    attends_in = {dtype: library.octavo_attends_in(i) for i, dtype in enumerate(_FLOATS)}
    multiplies_in = {dtype: library.octavo_multiplies_in(i) for i, dtype in enumerate(_FLOATS)}
    isa_name = None if name is None else name.decode()
    return Native(isa_name, why, library.octavo_convolves(), library.octavo_attends(), attends_in, multiplies_in)
