"""Kernels: a merge method's arithmetic, written once per element and compiled to native loops.

``language``  the expressions that a method writes (``where(abs(d) >= t, w * d, 0)``); no compiler
``trace``     a pass and the dtypes of a task, to a compiled kernel
``device``    where a pass runs: this machine's CPUs, or a CUDA device
``compile``   one native loop per pass, made in memory in tens of milliseconds
``cuda_code`` the same pass as PTX; ``cuda`` runs it, with ``cuda_memory`` and ``cuda_driver``
``emit``      expressions to LLVM instructions on vectors
``philox``    random numbers, likewise
"""
