"""Fused steps of the solvers, compiled for the CPU (Numba) and for GPUs (Triton).

Every one computes what the plain operations of PyTorch in the solver's own file compute, which
stay its reference, in fewer passes over memory and one call. Nothing here knows of solvers or of
the loop: tensors in, tensors out.
"""
