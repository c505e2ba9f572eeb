"""The int8 layers that replace float ones. `print(model)` shows them; a `forward` is one op call.

base.py                 QuantModule: what all of them share
linear.py               QuantLinear              nn.Linear and transformers' Conv1D (its weight is stored transposed:
                                                 [N, K] here)
                        DynamicQuantLinear       the same with int8 inputs, their scale that of the input at hand
                        StaticQuantLinear        the same with one scale for all inputs, chosen by calibration
embedding.py            QuantEmbedding           nn.Embedding
tied.py                 TiedQuantLinear,         a layer whose weight is another's: it holds no codes of its own, in
                        TiedQuantEmbedding       memory or on disk
conv.py                 QuantConv                nn.Conv1d/2d/3d
                        QuantConvTranspose       nn.ConvTranspose1d/2d/3d
experts.py              QuantExperts             a stack of experts, their weights 3-D: [E, N, K] here
multihead_attention.py  QuantMultiheadAttention  nn.MultiheadAttention: its packed input projections; its out_proj is a
                                                 QuantLinear
recurrent.py            QuantRecurrent           nn.LSTM, nn.GRU and nn.RNN
                        QuantRecurrentCell       their cells
shared_input.py         SharedInput              lets layers that are fed the same tensor quantize it once
int8_weight.py          Int8Weight               the weight of an int8 layer, for code that multiplies with it directly
float_linear.py         FloatLinear              a linear layer that stays float, with a faster kernel for few rows

A float parameter `P` becomes two buffers, `P` (int8 codes, output channels first) and `P_scale` (fp32). They keep
their dtypes under `.half()`, `.to(dtype)` and autocast. A bias stays the float parameter that it was.
"""

from octavo.modules.base import Codes, QuantModule
from octavo.modules.conv import QuantConv, QuantConvTranspose
from octavo.modules.embedding import QuantEmbedding
from octavo.modules.experts import QuantExperts
from octavo.modules.linear import DynamicQuantLinear, QuantLinear, StaticQuantLinear
from octavo.modules.multihead_attention import QuantMultiheadAttention
from octavo.modules.recurrent import QuantRecurrent, QuantRecurrentCell
from octavo.modules.tied import TiedQuantEmbedding, TiedQuantLinear

__all__ = [
    "Codes",
    "DynamicQuantLinear",
    "QuantConv",
    "QuantConvTranspose",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLinear",
    "QuantModule",
    "QuantMultiheadAttention",
    "QuantRecurrent",
    "QuantRecurrentCell",
    "StaticQuantLinear",
    "TiedQuantEmbedding",
    "TiedQuantLinear",
]
