"""What int8 inputs need to be known of a float model, in the order in which it is found.

calibrate.py      run the model on sample inputs
stats.py          what that saw, in memory and on disk: `Stats`
observers.py      what is kept of the inputs of a layer: channels' ranges, a histogram, a few rows
expert_inputs.py  and of the inputs of experts' down projections, which no hook sees
sensitivity.py    how much a layer's output suffers from int8, measured on the rows that were kept
"""
