"""Turn the layers of a model into int8 layers.

quantize.py       the steps below, one after the other: `octavo.quantize`
plan.py           decide the fate of every layer, and change nothing
static_inputs.py  choose the scales of static inputs, and find the layers that one scale would ruin
install.py        carry the plan out, one layer at a time
heap.py           let freed memory stay with the process, where eager PyTorch finds it again
coverage.py       report what became int8, what stayed float, and why
"""
