"""nn.MultiheadAttention with int8 projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octavo import ops
from octavo.errors import QuantizeError
from octavo.modules.base import Codes, QuantModule
from octavo.modules.linear import linear_per_token
from octavo.recipe import Scheme

__all__ = ["QuantMultiheadAttention"]


class QuantMultiheadAttention(QuantModule):
    """nn.MultiheadAttention with int8 projections. Their inputs are float or, if the scheme says so, int8 per token.
    The attention itself is torch's, in float.

    in_proj_weight: int8 [3E, E] (or q_proj_weight [E, E], k_proj_weight [E, kdim], v_proj_weight [E, vdim]), each
    with `*_scale` fp32 [N, 1] or [N, K/g]. in_proj_bias: [3E] float or None. out_proj: any layer E -> E.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    kdim: int
    vdim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    out_proj: nn.Module

    def __init__(self, layer: nn.Module, codes: Codes, scheme: Scheme, float_dtype: torch.dtype) -> None:
        super().__init__(layer, codes, scheme, float_dtype)
        self.op_names = ("w8a16_linear",) if scheme.input is None else ("quantize_per_token", "w8a8_linear")
        for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn"):
            setattr(self, name, getattr(layer, name))
        # False keeps torch's fused encoder path away, which would read float weights.
        self._qkv_same_embed_dim = False
        for name in ("in_proj_bias", "bias_k", "bias_v", "out_proj"):
            setattr(self, name, getattr(layer, name))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: query [B, L, E], key [B, S, kdim], value [B, S, vdim] if batch_first."""
        q, k, v = self._project(query, key, value)
        batched = query.dim() == 3
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        mask = self._mask(q, key_padding_mask, attn_mask, is_causal)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], 1, -1)], dim=1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:  # the appended bias and zero positions are open to all queries
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)  # scaled first, as fp16 may not hold the product
            weights = torch.softmax(logits if mask is None else logits + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, laid out like the inputs. With one weight for all three, inputs that are the same tensor take one
        product."""
        inputs = (query, key, value)
        codes = list(self.codes().values())
        if len(codes) == 3:
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (
                self._linear(x, weight, scale, bias)
                for x, (weight, scale), bias in zip(inputs, codes, biases, strict=True)
            )
            return q, k, v
        ((weight, scale),) = codes
        projected: list[Tensor] = []
        for count in _joined(query, key, value):
            first = len(projected)
            rows = slice(first * self.embed_dim, (first + count) * self.embed_dim)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            y = self._linear(inputs[first], weight[rows], scale[rows], bias)
            projected += y.chunk(count, dim=-1)
        q, k, v = projected
        return q, k, v

    def _linear(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        linear = ops.w8a16_linear if self.scheme.input is None else linear_per_token
        return linear(x, weight, scale, bias)

    def _mask(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the logits, broadcastable to [B, heads, L, S]; None if there is none."""
        if is_causal and attn_mask is None:
            raise QuantizeError("is_causal=True is a hint about attn_mask, which is None; pass the causal attn_mask")
        attn = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype)
        if attn is not None and attn.dim() == 3:
            attn = attn.unflatten(0, (q.shape[0], self.num_heads))
        padding = F._canonical_mask(key_padding_mask, "key_padding_mask", None, "", q.dtype)
        if padding is None:
            return attn
        padding = padding[:, None, None, :]
        return padding if attn is None else attn + padding

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {self.scheme}"


def _joined(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The lengths of runs of the same tensor in (query, key, value): (3,) in self-attention; (2, 1) in DETR, which adds
    positions to queries and keys only; (1, 2) in cross-attention."""
    if key is value:
        return (3,) if query is key else (1, 2)
    return (2, 1) if query is key else (1, 1, 1)
