"""Outliers of activations are moved into the weights: SmoothQuant, on any model.

trace.py     what a run of the model multiplied by which weight, and what it returned
pairs.py     where: which layer's output channels can be divided by factors that other layers' weights take back
smooth.py    by how much; factors folded, and proved to leave what the model computes as it was
smoothed.py  what outputs were divided by, read back from an int8 model
"""
