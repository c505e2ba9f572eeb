"""What vLLM makes of a checkpoint: a program of its own, for vLLM starts once in a process, and speaks.

    python -m tests.integrations.vllm_reader FOLDER TOKENS RESULT

TOKENS and RESULT are files of safetensors: `ids`, int64 [T], and `logprobs`, fp32 [T - 1, V], of each token but the
first.
"""

from __future__ import annotations

import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the kernel below is registered
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

import torch
import vllm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, register_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

CODES_PER_WORD = 4


class EightBitWeights(MPLinearKernel):
    """y = x W^T of packed 8-bit weights, for which vLLM has kernels on GPUs only; all that comes before is its own.

    weight_packed: int32 [N, K/4], of codes + 128. weight_scale: [N, groups].
    """

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return c.weight_type == scalar_types.uint8b128 and not c.zero_points, "not int8, symmetric"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed, scale, _ = self._get_weight_params(layer)
        codes = unpack_quantized_values_into_int32(packed.data, self.config.weight_type, packed_dim=1) - 128
        codes = codes[:, : self.config.partition_weight_shape[0]].float()
        self.weight = (codes.unflatten(1, (scale.shape[1], -1)) * scale.data.float().unsqueeze(-1)).flatten(1)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x.float(), self.weight)
        return (y if bias is None else y + bias.float()).to(x.dtype)


def logprobs(folder: str, ids: Tensor) -> Tensor:
    """Of each token of `ids`, [T], but the first: those of the whole vocabulary, [T - 1, V]."""
    model = vllm.LLM(
        folder, dtype="bfloat16", enforce_eager=True, max_model_len=len(ids) + 1, max_num_batched_tokens=2048,
        max_num_seqs=1, skip_tokenizer_init=True, max_logprobs=-1,
    )  # fmt: skip
    wanted = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    (request,) = model.generate([{"prompt_token_ids": ids.tolist()}], wanted)
    rows = [[row[token].logprob for token in range(len(row))] for row in request.prompt_logprobs[1:]]
    return torch.tensor(rows)


if __name__ == "__main__":
    folder, tokens, result = sys.argv[1:]
    register_linear_kernel(EightBitWeights, PlatformEnum.CPU)
    save_file({"logprobs": logprobs(folder, load_file(tokens)["ids"])}, result)
