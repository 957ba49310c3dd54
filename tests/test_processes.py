"""What processes agree on, with a second process that has the same."""

from __future__ import annotations

import pytest
import torch

from saltire import processes


def test_the_average_of_equals_is_what_each_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "sum_over_all", lambda tensor: 2 * tensor)
    tensors = [torch.randn(3, 4), torch.randn(()), torch.randn(2, 1, 5).transpose(0, 2)]
    before = [tensor.clone() for tensor in tensors]
    processes.average_over_all(tensors)
    for tensor, want in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, want)


def test_the_average_is_taken_in_place_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.arange(4.0)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "sum_over_all", lambda tensor: tensor + other)
    first, second = torch.zeros(3), torch.tensor(1.0)
    processes.average_over_all([first, second])
    torch.testing.assert_close(first, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(second, torch.tensor(2.0))
