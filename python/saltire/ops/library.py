"""Loads the compiled library; every file of ``saltire.ops`` imports this one first."""

from __future__ import annotations

from pathlib import Path

import torch

from saltire import _C

__all__ = ["HAS_CUDA_KERNELS", "_C", "load_cuda_library"]

CUDA_LIBRARY = Path(_C.__file__).with_name("libsaltire_cuda.so")


def load_cuda_library() -> bool:
    """Load the CUDA kernels if they were built and torch has CUDA; tell whether they are there."""
    if torch.version.cuda is None or not CUDA_LIBRARY.exists():
        return False
    torch.ops.load_library(str(CUDA_LIBRARY))
    return True


HAS_CUDA_KERNELS = load_cuda_library()
