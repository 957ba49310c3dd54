"""Nearest neighbours: the flat search is exact, the index on disk nearly so, chosen by size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from saltire.synth import pipeline, synthesise
from saltire.synth.neighbours import block_file, nearest
from tests.synth.small_runs import corpus, small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RECALL = 0.9  # of the flat search's neighbours, that the index on disk must find


def save_vectors(folder: Path, blocks: int, each: int) -> NDArray[np.float32]:
    """Unit vectors f32 [blocks · each, 48] around 60 centres, in files as a run writes them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    points = rng.standard_normal((60, 48))[rng.integers(60, size=blocks * each)]
    points = points + 0.6 * rng.standard_normal(points.shape)
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    for block in range(blocks):
        np.save(block_file(folder, block), points[block * each : (block + 1) * each])
    return points


def test_the_flat_search_over_blocks_is_exact(tmp_path: Path) -> None:
    points = save_vectors(tmp_path / "v", 3, 40)
    ids, cosines = nearest(tmp_path / "v", 3, 5)
    alike = points @ points.T
    np.fill_diagonal(alike, -np.inf)
    np.testing.assert_array_equal(ids, np.argsort(-alike, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(cosines, np.take_along_axis(alike, ids, 1), atol=1e-6)
    assert not (tmp_path / "v/index.faiss").exists()


def test_beyond_the_flat_size_an_index_on_disk_finds_nearly_the_same(tmp_path: Path) -> None:
    points = save_vectors(tmp_path / "v", 4, 500)
    exact, _ = nearest(tmp_path / "v", 4, 5, flat=2000)
    assert not (tmp_path / "v/index.faiss").exists()
    ids, cosines = nearest(tmp_path / "v", 4, 5, flat=1999)
    found = [len(set(a) & set(b)) / 5 for a, b in zip(ids, exact, strict=True)]
    assert np.mean(found) >= RECALL
    assert (ids != np.arange(2000)[:, None]).all()
    # The cosines are those of the vectors, not of their codes.
    near = np.einsum("nd,nkd->nk", points, points[ids])
    np.testing.assert_allclose(cosines, near, atol=1e-6)


def test_a_resumed_search_reads_the_index_that_it_finds(tmp_path: Path) -> None:
    save_vectors(tmp_path / "v", 2, 300)
    ids, cosines = nearest(tmp_path / "v", 2, 5, flat=100)
    index = tmp_path / "v/index.faiss"
    before = (index.stat().st_mtime_ns, index.stat().st_ino)
    again = nearest(tmp_path / "v", 2, 5, flat=100)
    np.testing.assert_array_equal(again[0], ids)
    np.testing.assert_array_equal(again[1], cosines)
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == before


def test_fewer_documents_than_neighbours_leave_places_empty(tmp_path: Path) -> None:
    save_vectors(tmp_path / "v", 1, 3)
    ids, cosines = nearest(tmp_path / "v", 1, 8)
    assert len(ids) == 3
    assert ((ids >= 0).sum(1) == 2).all()
    assert (cosines[ids < 0] == -np.inf).all()


def test_a_run_by_the_index_groups_every_document(tmp_path, scorer, monkeypatch) -> None:
    source = str(corpus(tmp_path / "in.jsonl", 300))
    built: list[bool] = []

    def by_index(folder: Path, blocks: int, k: int):
        found = nearest(folder, blocks, k, flat=200)
        built.append((folder / "index.faiss").exists())
        return found

    monkeypatch.setattr(pipeline, "nearest", by_index)
    facts = synthesise([source], tmp_path / "out", small(scorer, order="neighbour"))
    assert built == [True]
    assert facts["documents"] == 300
    assert facts["groups"] <= 150
