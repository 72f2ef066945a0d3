"""Compiled PTX, executed on a CPU by NumPy and watched.

`program.parse` reads a compiler's text, `execute.execute` runs programs (CTAs) of it on a `GlobalMemory`. Threads of
several programs run side by side: a register is an array over their lanes. `faults` lists the kinds of faults. The
source for all semantics is NVIDIA's PTX ISA, 8.x and 9.0.
"""
