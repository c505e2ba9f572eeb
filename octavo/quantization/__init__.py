"""Turn the layers of a model into int8 layers, in the order in which it is done.

quantize.py       all of it, in place
plan.py           decide the fate of every layer, and change nothing
static_inputs.py  scales of static inputs, and the layers that one scale would ruin
install.py        carry the plan out, one layer at a time
heap.py           freed memory stays with the process, so that eager PyTorch finds it again
coverage.py       what became int8, what stayed float, and why
"""
