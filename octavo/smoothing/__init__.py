"""SmoothQuant on any model: outliers of activations are moved into the weights.

trace.py     what a run of the model multiplied by which weight, and what it returned
norms.py     which modules are norms, and whether they scale by their weight or by 1 + it
layouts.py   how the output channels of one layer become the input channels of another
pairs.py     where to smooth: layers whose outputs can be divided by factors that other layers' weights take back
factors.py   by how much: the factors of a pair, by a given alpha or by the one with the smallest error
fold.py      a pair's factors multiplied into its weights, and taken out again
proof.py     the model computes what it did; folds that change it are taken out
smooth.py    the steps above, one after the other: `octavo.smooth`
smoothed.py  what outputs were divided by, read back from an int8 model
"""
