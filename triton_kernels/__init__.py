"""Triton kernels of fastsae: one file or folder per operator, jitted kernels and their launchers.

This folder is packaged as `fastsae.triton_kernels`.
"""

if __name__ != "fastsae.triton_kernels":
    raise ImportError(
        f"this folder is packaged as `fastsae.triton_kernels`, and was imported as `{__name__}`: "
        "install fastsae (`pip install --no-build-isolation -e .`) and import that name. If you "
        "meant the `triton_kernels` of the Triton project, run from outside fastsae's checkout."
    )

import triton

# `triton.jit` decides this when it decorates a kernel, that is when this package is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
