"""Kernels: a merge method's arithmetic, written once per element and compiled to native loops.

``language``  the expressions that a method writes (``where(abs(d) >= t, w * d, 0)``); no compiler
``trace``     a pass and the dtypes of a task, to a compiled kernel
``compile``   one native loop per pass, made in memory in tens of milliseconds
``emit``      expressions to LLVM instructions on vectors
``philox``    random numbers, likewise
"""
