"""The one form that every transform of the family takes, and its exact inverse on weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire import ops
from saltire.reference import transform_quantize as reference


@dataclass(frozen=True)
class Transform:
    """``T(x) = leftᵀ·(X / D)·right`` for inputs, and for weights the map that undoes it.

    A token of K channels is seen as X [A, B], row-major. D: ``diagonal``, float [K], positive.
    right: dense [B, B], or else the Hadamard matrix of size ``hadamard``. left: dense [A, A] or
    None. Dense factors need not be orthogonal, only invertible. V(w) = left⁻¹·(W ∘ D)·right⁻ᵀ::

        T(x)·V(w)ᵀ = x·wᵀ        for every x and w, exactly, before anything is rounded

    ``none`` has neither; ``smooth`` the diagonal; ``hadamard`` orthogonal factors; ``kronecker``
    (FlatQuant) two dense factors and the diagonal; ``bdq`` the diagonal and orthogonal factors.
    """

    diagonal: Tensor
    hadamard: int = 1
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.diagonal.shape[0]

    @property
    def scales(self) -> bool:
        """Whether the diagonal does anything."""
        return bool((self.diagonal != 1).any())

    def inputs(self, x: Tensor) -> Tensor:
        """T(x), in float64 for a float64 x and else in float32: [tokens, K]."""
        return self._apply(x, 1.0 / self.diagonal, self.left, self.right)

    def weights(self, weight: Tensor) -> Tensor:
        """V(w): [N, K]."""
        return self._apply(weight, self.diagonal, _dual(self.left), _dual(self.right))

    def back(self, weight: Tensor) -> Tensor:
        """The inverse of ``weights``: w = (left·V·rightᵀ) / D."""
        left, right = (None if m is None else m.T.contiguous() for m in (self.left, self.right))
        return self._apply(weight, None, left, right) / self.diagonal.to(weight.dtype)

    def _apply(
        self, x: Tensor, diag: Tensor | None, left: Tensor | None, right: Tensor | None
    ) -> Tensor:
        if x.dtype == torch.float64:
            return reference.transform(x, diag, self.hadamard, left, right)
        return ops.transform(
            x,
            diag=None if diag is None else diag.float(),
            hadamard=1 if right is not None else self.hadamard,
            left=None if left is None else left.float(),
            right=None if right is None else right.float(),
        )


def _dual(factor: Tensor | None) -> Tensor | None:
    """The factor that weights need where inputs have this one: the inverse, transposed."""
    if factor is None:
        return None
    return torch.linalg.inv(factor.double()).T.contiguous().to(factor.dtype)
