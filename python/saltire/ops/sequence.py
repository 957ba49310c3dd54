"""The best order of documents given pairwise gains (room ``csrc/sequence``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads torch.ops.saltire)

MOST_EXACT_ORDERING = 24  # documents; 2^24 doubles are 128 MB
MOST_EXACT_PATH = 20
AUTO_EXACT_ORDERING = 20  # what "auto" solves exactly: some tens of milliseconds
AUTO_EXACT_PATH = 16


@dataclass(frozen=True)
class Ordering:
    """order: documents, first to last. value: the objective. bound: no order exceeds it. exact:
    the order is known to be best, and then bound = value.
    """

    order: list[int]
    value: float
    bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """(bound - value) / |bound|: 0 for an exact order, else at least the true gap."""
        return (self.bound - self.value) / abs(self.bound) if self.bound != self.value else 0.0


def best_ordering(
    w: Tensor,
    *,
    length: Tensor | None = None,
    slope: float = 0.0,
    exact: bool | None = None,
    starts: int = 8,
    kicks: int = 20,
    seed: int = 0,
) -> Ordering:
    """The order with the largest Σ_{a before b} W[a, b] · (1 + slope · d(a, b) / T).

    d(a, b): tokens between a and b; T: tokens of all. slope 0: the linear ordering problem; above
    0 far pairs count more, below 0 near ones. w: float [n, n], the diagonal is not read. length:
    float [n] tokens (None: equal). exact: None solves up to 20 documents exactly and searches
    beyond; True takes at most 24. starts, kicks, seed: of the search, which is deterministic.
    Raises SaltireError for a w that is not square and finite, or too large to be exact.
    Source: docs/re3syn.md; the exact solution for slope ≠ 0 is ours.
    """
    w, n = _matrix(w)
    tokens = torch.ones(n, dtype=torch.float64) if length is None else length.double()
    if exact is None:
        exact = n <= AUTO_EXACT_ORDERING
    try:
        if exact:
            found = torch.ops.saltire.sequence_exact_ordering(w, tokens, slope)
        else:
            found = torch.ops.saltire.sequence_search_ordering(
                w, tokens, slope, starts, kicks, seed
            )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    return _ordering(found, exact)


def best_path(
    w: Tensor, *, exact: bool | None = None, starts: int = 8, kicks: int = 20, seed: int = 0
) -> Ordering:
    """The order with the largest Σ_k W[order k, order k + 1]; arguments as ``best_ordering``.

    exact: None solves up to 16 documents exactly; True takes at most 20.
    """
    w, n = _matrix(w)
    if exact is None:
        exact = n <= AUTO_EXACT_PATH
    try:
        if exact:
            found = torch.ops.saltire.sequence_exact_path(w)
        else:
            found = torch.ops.saltire.sequence_search_path(w, starts, kicks, seed)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    return _ordering(found, exact)


def _matrix(w: Tensor) -> tuple[Tensor, int]:
    if w.dim() != 2 or w.shape[0] != w.shape[1] or not len(w):
        raise SaltireError(f"w is {tuple(w.shape)}; expected a square matrix, one row a document.")
    return w.detach().double(), w.shape[0]


def _ordering(found: tuple[Tensor, Tensor], exact: bool) -> Ordering:
    order, (value, bound) = found[0].tolist(), found[1].tolist()
    return Ordering(order, value, bound, exact)


def _order_fake(w: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return w.new_empty((w.shape[0],), dtype=torch.int64), w.new_empty((2,))


for _name in ("exact_ordering", "exact_path", "search_ordering", "search_path"):
    torch.library.register_fake(f"saltire::sequence_{_name}", _order_fake)
