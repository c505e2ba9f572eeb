"""Float parts of a model computed with fewer kernels, and with the same bits.

norms.py   RMS norms in one or two kernels instead of eight
gated.py   gated MLPs, whose activation and product are one kernel instead of two
rotary.py  rotary embeddings of queries and keys in one kernel instead of ten

Modules are recognized by what they compute, not by the names of their classes: a copy is run (`octavo.stand_ins`).
"""
