"""What did quantizing cost? A model's perplexity, and an int8 model compared with the float model that it came from.

    perplexity   exp of the mean negative log likelihood of a text's tokens                             likelihood.py
    KL           mean over positions of sum_v p(v) * (log p(v) - log q(v)), in nats; p = softmax of     comparison.py
                 the float logits, q = softmax of the int8 logits
    top-1        fraction of positions where both models choose the same token (class): the one with
                 the highest logit, the first of equal ones, as in greedy decoding. In bf16 and fp16
                 many logits are equal, and rounding decides
    SQNR         10 * log10(sum f^2 / sum (f - q)^2), in dB: at 20 dB the error is a tenth of the
                 signal, at 40 dB a hundredth
    cosine       sum f*q / (|f| * |q|) of a position's output row

Perplexity changes little, and in either direction. KL and SQNR see every change, and SQNR says in which layer it is.

A model here is any callable: nothing in this package knows how a model was quantized. An `nn.Module` is judged in eval
mode and without gradients, on the device of its first parameter, and gets its mode back; any other callable is called
as it is. Which tensor of a model's output is judged is decided in outputs.py.
"""

from octavo.evaluate.comparison import compare, sqnr
from octavo.evaluate.likelihood import perplexity

__all__ = ["compare", "perplexity", "sqnr"]
