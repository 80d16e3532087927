"""Triton kernels: kernels and launchers, no autograd, no dispatch. Imported as `triskele.triton_kernels`."""

if __name__ != "triskele.triton_kernels":  # a pip package of the bare name exists; never stand in for it
    raise ImportError(f"this folder is the package triskele.triton_kernels; it was imported as {__name__!r}")
