from __future__ import annotations

import pickle

import torch
from sklearn.datasets import load_digits

from bim.orchestrator.data.digits import DigitsSource


def test_digits_are_stretched_to_the_full_range():
    source, original = DigitsSource(), load_digits()
    assert len(source) == 1797
    assert source.labels is not None
    assert source.labels.tolist() == original.target.tolist()
    image = source.load(0)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    for channel in image:
        assert torch.equal(channel, torch.from_numpy(original.images[0] / 16 * 255).round().to(torch.uint8))
    assert max(int(source.load(i).max()) for i in range(20)) == 255


def test_a_copy_is_equal_and_has_the_same_fingerprint():
    source = DigitsSource()
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.load(1796), source.load(1796))
    assert copy.fingerprint() == source.fingerprint()
    assert copy.sample_id(7) == "digit 7"
