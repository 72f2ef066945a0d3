"""Compiled PTX, executed on a CPU by NumPy and watched.

`program.parse` reads what a compiler wrote, `execute.execute` runs programs (CTAs) of it on a `GlobalMemory`. All
threads of several programs run side by side: a register is an array over their lanes. `faults` lists what is watched.
The source for all semantics is NVIDIA's PTX ISA, 8.x and 9.0.
"""
