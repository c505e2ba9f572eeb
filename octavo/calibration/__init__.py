"""Calibration: collect from a float model what is needed to quantize its layers' inputs.

calibrate.py      run the model on sample inputs
stats.py          the statistics, in memory and on disk: `Stats`
observers.py      what is kept of the inputs of a layer: channels' ranges, a histogram, a few rows
expert_inputs.py  the same for the inputs of experts' down projections, which no hook sees
sensitivity.py    how much a layer's output suffers from int8, measured on the rows that were kept
"""
