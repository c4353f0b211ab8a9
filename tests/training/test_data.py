"""The digits: how many, how scaled, how split."""

import builtins

import pytest
import torch

from gradl1_fast.training.data import digits, shuffled_batches


def test_every_image_is_in_one_part():
    data = digits(0)
    assert data.train[0].shape == (1200, 1, 8, 8)
    assert data.test[0].shape == (597, 1, 8, 8)
    both = torch.cat([data.train[1], data.test[1]])
    assert both.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_scaled_by_the_training_images_alone():
    data = digits(0)
    assert data.train[0].dtype == torch.float32
    assert abs(data.train[0].mean()) < 1e-5
    assert abs(data.train[0].std() - 1) < 1e-5
    assert 1e-5 < abs(data.test[0].mean()) < 0.1


def test_one_seed_one_split():
    assert torch.equal(digits(3).test[0], digits(3).test[0])
    assert not torch.equal(digits(3).test[1], digits(4).test[1])


def test_batches_are_whole_shuffled_and_disjoint():
    data = (torch.arange(10).float(), torch.arange(10))
    batches = list(shuffled_batches(data, 4, torch.Generator().manual_seed(0)))
    assert [len(x) for x, _ in batches] == [4, 4]
    seen = torch.cat([y for _, y in batches]).tolist()
    assert len(set(seen)) == 8
    assert seen != sorted(seen)
    assert all(torch.equal(x, y.float()) for x, y in batches)


def test_without_scikit_learn_says_what_to_install(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install '\.\[cli\]'"):
        digits()
