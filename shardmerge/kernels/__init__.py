"""Kernels: a merge method's arithmetic, written once per element and compiled to native loops.

``language``  the expressions that a method writes (``where(abs(d) >= t, w * d, 0)``); no compiler
``llvm``      expressions to vector machine code: one fused loop, no temporaries, tens of milliseconds
"""
