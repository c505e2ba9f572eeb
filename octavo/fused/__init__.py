"""Float parts of a model in fewer kernels, the same bits.

norms.py   RMS norms in one or two kernels instead of eight
gated.py   gated MLPs, whose activation and product are one kernel instead of two
rotary.py  rotary embeddings of queries and keys in one kernel instead of ten

What a module computes is asked of itself, whatever its class is called: of a copy that is run (`octavo.stand_ins`).
"""
