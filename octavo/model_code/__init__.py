"""Deal with the code of a model's own classes, which was written for float layers.

class_source.py       read the source of a class: what its methods read of layers, and which parts they call
product_arguments.py  find arguments of calls that are only used as the weight of a product
weight_readers.py     find code that reads a layer's weight instead of calling the layer: such layers stay float
written_out.py        recognize classes that only write out what the torch layer that they derive from does
products.py           make products with a layer's weight look like calls of the layer, so that hooks see them
facade.py             make an int8 layer look like the float one: the methods of its class, its weight's dtype
"""
