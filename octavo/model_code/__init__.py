"""The code of a model's own classes, which was written for float layers.

class_source.py       what the source of a class says that its methods do with parts of self
product_arguments.py  which arguments of calls go into a product, with nothing else done to them
weight_readers.py     code that reads a layer's weight instead of calling the layer: such layers stay float
written_out.py        classes that write out what the layer does that they derive from: taken for that layer
products.py           products that other code makes with a layer's weight, as calls of the layer: hooks see them
facade.py             what an int8 layer shows to code around it: the methods of its class, and a weight
"""
