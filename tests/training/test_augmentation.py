"""Augmentation: flips and shifts, the same for the same numbers."""

import pytest
import torch

from gradl1_fast.training.data.augmentation import augment, generator_of

IMAGES = torch.arange(1.0, 1 + 50 * 2 * 5 * 6).reshape(50, 2, 5, 6)


def test_a_flip_mirrors_about_half_of_the_images_and_no_other_change():
    found = augment(IMAGES, generator_of(0), flip=True, crop=0)
    mirrored = [torch.equal(one, image.flip(2)) for one, image in zip(found, IMAGES, strict=True)]
    kept = [torch.equal(one, image) for one, image in zip(found, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 15 < sum(mirrored) < 35


def test_a_crop_shifts_by_at_most_so_many_pixels_and_zeros_come_in():
    found = augment(IMAGES, generator_of(0), flip=False, crop=2)
    shifts = set()
    for one, image in zip(found, IMAGES, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        places = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(one, padded[:, top : top + 5, left : left + 6])
        ]
        assert len(places) == 1
        shifts |= set(places)
    assert {top for top, _ in shifts} == {left for _, left in shifts} == set(range(5))


def test_the_numbers_alone_decide():
    first, again, other = (
        augment(IMAGES, generator_of(*key), flip=True, crop=1) for key in ((1, 2, 3), (1, 2, 3), (1, 3, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("one", "other"), [((0,), (0, 0)), ((0, 1), (1, 0)), ((2, 0), (1, 1))])
def test_different_numbers_are_different_generators(one, other):
    assert generator_of(*one).initial_seed() != generator_of(*other).initial_seed()


def test_the_images_and_the_default_generator_stay_as_they_were():
    before, state = IMAGES.clone(), torch.get_rng_state()
    augment(IMAGES, generator_of(0), flip=True, crop=1)
    assert torch.equal(IMAGES, before)
    assert torch.equal(torch.get_rng_state(), state)
