from __future__ import annotations

import numpy as np

from bim.orchestrator.data.sampler import Chunks, epoch_permutation


def chunks(sizes: list[int], window: int) -> Chunks:
    return Chunks(np.cumsum([0, *sizes]), window)


def reads(order: np.ndarray, layout: Chunks) -> int:
    """Number of chunks fetched by a reader that caches the last `window` of them."""
    cached: list[int] = []
    fetched = 0
    for chunk in np.searchsorted(layout.starts, order, side="right") - 1:
        if chunk not in cached:
            fetched += 1
        else:
            cached.remove(chunk)
        cached = [*cached, int(chunk)][-layout.window :]
    return fetched


def test_order_is_a_permutation_of_the_indices():
    indices = np.array([3, 5, 8, 13, 21, 34])
    for layout in (None, chunks([5] * 7, 2)):
        assert sorted(epoch_permutation(indices, 0, 0, layout)) == indices.tolist()


def test_order_depends_on_seed_and_epoch_only():
    indices = np.arange(100)
    first = epoch_permutation(indices, 1, 2)
    assert np.array_equal(first, epoch_permutation(indices, 1, 2))
    assert not np.array_equal(first, epoch_permutation(indices, 1, 3))
    assert not np.array_equal(first, epoch_permutation(indices, 2, 2))


def test_chunked_order_reads_every_chunk_once():
    layout = chunks([10, 7, 12, 10, 1, 10, 10, 9, 10, 10], window=3)
    indices = np.flatnonzero(np.arange(layout.starts[-1]) % 5)  # a split leaves holes
    for epoch in range(5):
        assert reads(epoch_permutation(indices, 0, epoch, layout), layout) == 10
    assert reads(epoch_permutation(indices, 0, 0), layout) > 40  # what a full permutation would cost


def test_chunked_order_mixes_chunks_inside_a_window_and_windows_between_epochs():
    layout = chunks([50] * 8, window=4)
    first = epoch_permutation(np.arange(400), 0, 0, layout) // 50
    assert all(len(set(first[k : k + 40])) == 4 for k in range(0, 200, 40))
    assert {frozenset(epoch_permutation(np.arange(400), 0, e, layout)[:200] // 50) for e in range(6)} != {
        frozenset(first[:200])
    }


def test_chunks_that_fit_the_window_give_a_full_permutation():
    assert np.array_equal(
        epoch_permutation(np.arange(40), 0, 0, chunks([10] * 4, 4)), epoch_permutation(np.arange(40), 0, 0)
    )
