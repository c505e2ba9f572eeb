"""Compile what the ops launch for GPUs that need not be there, and print what the compiler says of it, as JSON.

Run as a program, for here the kernels must not be interpreted: `python ahead_of_time.py sm_80 sm_90 [OP ...]`. Each op
is called on tensors of the CPU that nobody has filled, under a driver that knows a GPU by name only; a launch compiles
the kernel for the very tile, dtypes and alignment that this call takes, and does not start it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.ops import triton as kernels
from octavo.ops.gates import GATES
from octavo.ops.triton import launch
from octavo.ops.triton.gate import start_gated
from octavo.ops.triton.norm import start_rms_norm
from octavo.ops.triton.rotary import start_rotary

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def codes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int8)


def scale(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=FP32)


def floats(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def linear_calls() -> Iterator[tuple[Any, ...]]:
    """Every tile, with one scale for a row and with groups, odd ones too; a bias, and a K of which nothing is known."""
    for dtype in (BF16, FP16, FP32):
        for m in (1, 16, 32, 64, 128, 256, 512):
            yield floats(dtype, m, 4096), codes(4096, 4096), scale(4096, 1), None
            yield floats(dtype, m, 4096), codes(4096, 4096), scale(4096, 32), None
        for m in (1, 16, 64, 512):
            yield floats(dtype, m, 4096), codes(4096, 4096), scale(4096, 512), None
        yield floats(dtype, 1, 4096), codes(1024, 4096), scale(1024, 1), floats(dtype, 1024)
        yield floats(dtype, 8, 1001), codes(1003, 1001), scale(1003, 1), floats(dtype, 1003)
        yield floats(dtype, 4096, 4096), codes(28672, 4096), scale(28672, 1), floats(FP32, 28672)


def linears_calls() -> Iterator[tuple[Any, ...]]:
    """q/k/v and gate/up of a row, with biases and without, with groups, sizes that are odd."""
    for dtype in (BF16, FP16, FP32):
        for sizes, k, groups, bias in (
            ((4096, 1024, 1024), 4096, 1, None), ((3584, 512, 512), 3584, 1, dtype), ((11008, 11008), 4096, 1, None),
            ((4096, 1024, 1024), 4096, 32, None), ((1003, 33), 1001, 1, None),
        ):  # fmt: skip
            biases = [None if bias is None else floats(bias, n) for n in sizes]
            yield floats(dtype, 1, k), [codes(n, k) for n in sizes], [scale(n, groups) for n in sizes], biases


def int8_linear_calls() -> Iterator[tuple[Any, ...]]:
    """Every tile, a scale for each row and for all, a bias, every dtype, and a K of which nothing is known."""
    for m in (1, 16, 32, 64, 128, 256, 512):
        yield codes(m, 4096), scale(m, 1), codes(4096, 4096), scale(4096, 1), None, BF16
    for dtype in (BF16, FP16, FP32):
        yield codes(1, 14336), scale(1), codes(1024, 14336), scale(1024, 1), floats(dtype, 1024), dtype
        yield codes(8, 1001), scale(1), codes(1003, 1001), scale(1003, 1), floats(dtype, 1003), dtype
        yield codes(4096, 4096), scale(4096, 1), codes(28672, 4096), scale(28672, 1), floats(dtype, 28672), dtype
        yield codes(4096, 4096), scale(1), codes(28672, 4096), scale(28672, 1), None, dtype


def int8_linears_calls() -> Iterator[tuple[Any, ...]]:
    for x, weight, weight_scale, bias in linears_calls():
        if weight_scale[0].shape[1] == 1:
            yield codes(*x.shape), scale(1, 1), weight, weight_scale, bias, x.dtype


def rows_calls() -> Iterator[tuple[Any, ...]]:
    """Short rows and long, and those that are read twice."""
    for dtype in (BF16, FP16, FP32, torch.float64):
        for m, k in ((1, 4096), (4096, 128), (64, 14336), (64, 20000), (1, 20480), (3, 1001)):
            yield (floats(dtype, m, k),)


def states_calls() -> Iterator[tuple[Any, ...]]:
    """Keys and values, as a projection gives them, to where a cache keeps them: a token, and many, of heads of every
    size, of one that nothing divides and of the longest."""
    for dtype in (BF16, FP16, FP32, torch.float64):
        for tokens, size in ((1, 128), (2048, 64), (2048, 128), (2048, 256), (2048, 77), (2, 8192)):
            x = floats(dtype, 1, tokens, 8, size).transpose(1, 2)
            key, key_scale, value, value_scale = in_a_cache(x, x)
            yield x, key, key_scale, False
            yield x, value, value_scale, True


def norm_calls() -> Iterator[tuple[Any, ...]]:
    """Rows of models, of heads, of one element, and the longest."""
    for dtype in (BF16, FP16, FP32):
        for m, k in ((1, 4096), (2048, 4096), (4096, 128), (3, 1001), (5, 1), (64, 16384)):
            for round_first in (True, False):
                yield floats(dtype, m, k), floats(dtype, k), floats(dtype, m, k), 1e-6, round_first


def gate_calls() -> Iterator[tuple[Any, ...]]:
    """A row and rows of models, and a number of elements that no vector divides; both activations."""
    for dtype in (BF16, FP16, FP32):
        for shape, gate in itertools.product(((1, 11008), (2048, 11008), (3, 1001)), GATES.values()):
            yield floats(dtype, *shape), floats(dtype, *shape), floats(dtype, *shape), gate.a, gate.b


LLAMA = (32, 8, 128)


def rotary_calls() -> Iterator[tuple[Any, ...]]:
    """A token and a prompt of Llama, heads that no vector divides, and one row of angles for each sequence."""
    for dtype in (BF16, FP16, FP32):
        for batch, tokens, (heads, key_heads, size) in ((1, 1, LLAMA), (1, 2048, LLAMA), (2, 3, (5, 1, 34))):
            q, k = (floats(dtype, batch, tokens, count, size) for count in (heads, key_heads))
            yield q, k, floats(dtype, batch, tokens, size), floats(dtype, batch, tokens, size), q.clone(), k.clone()


def static_calls() -> Iterator[tuple[Any, ...]]:
    for (x,) in rows_calls():
        yield x, scale(1)


def embedding_calls() -> Iterator[tuple[Any, ...]]:
    """Long rows and short, an index of either width, every dtype."""
    for dtype in (BF16, FP16, FP32, torch.float64):
        yield torch.empty(4096, dtype=torch.int64), codes(128256, 4096), scale(128256, 1), dtype
        yield torch.empty(1, dtype=torch.int32), codes(49152, 576), scale(49152, 1), dtype
        yield torch.empty(77, dtype=torch.int64), codes(1000, 100), scale(1000, 1), dtype


MIXTRAL, QWEN3, SMALL, LEAST = (8, 4096, 14336), (128, 2048, 768), (8, 255, 4095), (1, 1, 16)
"""Experts E, and N and K of a projection of each. A 1 among the arguments is compiled as a constant."""


def experts_linear_calls() -> Iterator[tuple[Any, ...]]:
    for dtype in (BF16, FP16, FP32):
        for rows, (e, n, k) in expert_shapes():
            x, ends = torch.empty(rows, k, dtype=dtype), torch.empty(e, dtype=torch.int32)
            yield x, ends, codes(e, n, k), scale(e, n, 1), None
            yield x, ends, codes(e, n, k), scale(e, n, 1), torch.empty(e, n, dtype=dtype)


def int8_experts_linear_calls() -> Iterator[tuple[Any, ...]]:
    for dtype in (BF16, FP16, FP32):
        for rows, (e, n, k) in expert_shapes():
            bias = torch.empty(e, n, dtype=dtype) if dtype == BF16 else None
            ends = torch.empty(e, dtype=torch.int32)
            yield codes(rows, k), scale(rows, 1), ends, codes(e, n, k), scale(e, n, 1), bias, dtype


def expert_shapes() -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Rows and shape: each tile of a single row, each of several."""
    yield from ((2, MIXTRAL), (8, QWEN3), (2, SMALL), (2, LEAST))
    yield from ((64, MIXTRAL), (128, MIXTRAL), (500, MIXTRAL), (4096, MIXTRAL), (64, SMALL))


def int8_attention_calls() -> Iterator[tuple[Any, ...]]:
    for dtype in (BF16, FP16, FP32):
        for rows, keys, size in ((2048, 512, 64), (2048, 512, 128), (2047, 511, 128), (1, 4096, 128)):
            yield heads(rows, keys, size, size, dtype, torch.empty((1, 1, rows, keys), dtype=dtype))
    for rows, keys, size, width in ((2048, 512, 64, 64), (2047, 511, 128, 128), (1, 4001, 80, 80), (64, 512, 192, 128)):
        yield heads(rows, keys, size, width, BF16, None)
        yield heads(rows, keys, size, width, BF16, torch.empty((1, 1, rows, keys), dtype=torch.bool))
    yield heads(64, 512, 256, 256, BF16, torch.empty((1, 1, 64, 512), dtype=BF16))
    yield (*heads(512, 512, 128, 128, BF16, torch.empty((1, 1, 512, 512), dtype=BF16)), 30.0)
    yield heads(90, 512, 17, 19, BF16, None)


def heads(
    rows: int, keys: int, size: int, width: int, dtype: torch.dtype, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """4 heads to a key; the scaling is that of Llama."""
    query, key, value = (
        torch.zeros(shape, dtype=dtype) for shape in ((1, 8, rows, size), (1, 2, keys, size), (1, 2, keys, width))
    )
    return query, key, value, mask, size**-0.5


def int8_attention_of_codes_calls() -> Iterator[tuple[Any, ...]]:
    """Decode and drafts of a few tokens, whose keys and values are read where a cache keeps them, and a prompt."""
    for size, width, keys in ((64, 64, 4096), (128, 128, 4096), (128, 128, 4001), (80, 80, 4096), (192, 128, 4096)):
        query, key, value, *rest = heads(1, keys, size, width, BF16, None)
        yield query, *in_a_cache(key, value), *rest
    for rows, dtype in ((1, BF16), (4, FP16), (4, FP32), (512, BF16)):
        query, key, value, *rest = heads(rows, 4096, 128, 128, dtype, torch.empty((1, 1, rows, 4096), dtype=dtype))
        yield query, *in_a_cache(key, value), *rest
    query, key, value, *rest = heads(4, 4096, 256, 256, BF16, torch.empty((1, 1, 4, 4096), dtype=torch.bool))
    yield query, *in_a_cache(key, value), *rest, 50.0


def float_attention_of_codes_calls() -> Iterator[tuple[Any, ...]]:
    """Decode, and drafts of a few tokens; in a cache the scales of a token lie behind the codes of its key."""
    for dtype, size in itertools.product((BF16, FP16, FP32), (64, 128, 256)):
        for rows, mask in ((1, None), (3, torch.empty((1, 1, 3, 4096), dtype=torch.bool))):
            query, key, value, *rest = heads(rows, 4096, size, size, dtype, mask)
            yield query, *in_a_cache(key, value), *rest, False
    query, key, value, *rest = heads(4, 4001, 64, 128, BF16, None)
    yield query, *in_a_cache(key, value), *rest, True


def in_a_cache(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    size = key.shape[3]
    packed = torch.zeros((*key.shape[:3], (size + 3) // 4 * 4 + 8), dtype=torch.int8)
    scales = packed[..., -8:].view(torch.float32)
    return packed[..., :size], scales[..., :1], torch.zeros_like(value, dtype=torch.int8), scales[..., 1:]


CALLS: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
    "quantize_per_token": rows_calls,
    "quantize_per_tensor": rows_calls,
    "quantize_static": static_calls,
    "quantize_weight": rows_calls,
    "quantize_states": states_calls,
    "w8a16_embedding": embedding_calls,
    "w8a16_linear": linear_calls,
    "w8a16_linears": linears_calls,
    "w8a8_linear": int8_linear_calls,
    "w8a8_linears": int8_linears_calls,
    "w8a16_experts_linear": experts_linear_calls,
    "w8a8_experts_linear": int8_experts_linear_calls,
    "int8_attention": int8_attention_calls,
    "int8_attention_of_codes": int8_attention_of_codes_calls,
    "float_attention_of_codes": float_attention_of_codes_calls,
    "rms_norm": norm_calls,
    "gated": gate_calls,
    "rotary": rotary_calls,
}
"""Op -> arguments of the calls that are compiled: every tile of its table, and every dtype."""

BETWEEN: dict[str, Callable[..., Any]] = {"rms_norm": start_rms_norm, "gated": start_gated, "rotary": start_rotary}
"""What starts the kernels that are none of an op of the table."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel as the assembler left it. spilled, shared: bytes."""

    op: str
    kernel: str
    target: str
    meta: str
    registers: int
    spilled: int
    shared: int
    vector_loads: int
    """Loads of 16 bytes from global memory, or copies of 16 bytes to shared memory."""
    tensor_core: str
    """Instructions of the tensor cores: "wgmma", "mma" or "" if there are none."""


class NoGpu:
    """A driver that knows its target, and has nothing to launch on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_calls(ops: list[str], target: str) -> list[Compiled]:
    """Every launch of the calls of `ops`, compiled for `target`, each once."""
    capability = int(target.removeprefix("sm_"))
    driver.set_active(NoGpu(capability))
    launch.is_hopper = lambda x: capability // 10 in (9, 10)
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in found:
            chosen = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
            chosen |= {
                name: kernel.src.constants[place,] for place, name in enumerate(self.arg_names) if name.isupper()
            }
            meta = ", ".join(f"{name}={value}" for name, value in chosen.items())
            found[kernel.hash] = described(op, self.__name__, target, meta, kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        for op in ops:
            function = BETWEEN[op] if op in BETWEEN else kernels.OPS[op]()
            for arguments in CALLS[op]():
                function(*arguments)
    finally:
        JITFunction.run = run
    return list(found.values())


def described(op: str, name: str, target: str, meta: str, kernel: Any) -> Compiled:
    usage = resources(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4\.(?:b|u|f)32|cp\.async\.cg\.shared\.global", ptx))
    core = "wgmma" if "wgmma.mma" in ptx else "mma" if re.search(r"\bmma\.sync", ptx) else ""
    return Compiled(
        op, name, target, meta, usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared, wide, core
    )


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on of the one kernel in `cubin`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", text.stdout)}


def main(targets: list[str], ops: list[str]) -> None:
    for target in targets:
        for one in compile_calls(ops or list(CALLS), target):
            print(json.dumps(dataclasses.asdict(one)))


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if a.startswith("sm_")], [a for a in sys.argv[1:] if not a.startswith("sm_")])
