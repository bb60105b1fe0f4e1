"""EDM's augmentation: exact where nothing lies between pixels, right where it does, told by its label, and no leak."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.dit_options import DiTOptions
from models.layers import AUGMENTATION_LABELS, Conditioning
from models.registry import build_network
from models.tangent.engines import single_pass
from sctrain.augmentation import draw_labels, source_matrices, transformed
from sctrain.config.objectives import EdmObjective
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Networks, Progress
from sctrain.objectives.diffusion import Diffusion
from sctrain.objectives.drawing import Data
from sctrain.randomness import Purpose, SampleGenerator

START = Progress(0, 1)


def label(**entries: float) -> Tensor:
    """(1, 9), of named entries."""
    names = ("flip_x", "flip_y", "scale", "cos", "sin", "p", "q", "right", "down")
    return torch.tensor([[entries.get(name, 0.0) for name in names]])


def rotation(angle: float) -> Tensor:
    return label(cos=math.cos(angle) - 1, sin=math.sin(angle))


def anisotropy(stretch: float, direction: float) -> Tensor:
    return label(p=stretch * math.cos(2 * direction), q=stretch * math.sin(2 * direction))


def generator(positions=range(2000), purpose=Purpose.AUGMENTATION) -> SampleGenerator:
    return SampleGenerator(3, positions, purpose)


def wave(height: int, width: int, matrix: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """A slow wave, seen through a map of its coordinates (pixels, centre 0): (1, 1, H, W) in float64."""
    y, x = torch.meshgrid(
        torch.arange(height).double() - (height - 1) / 2, torch.arange(width).double() - (width - 1) / 2, indexing="ij"
    )
    points = torch.stack([x, y], -1) - (torch.zeros(2) if shift is None else shift)
    x, y = (points @ (torch.eye(2) if matrix is None else matrix).double().T).unbind(-1)
    return (torch.sin(0.25 * x + 0.3) * torch.cos(0.2 * y - 0.2))[None, None]


def middle(image: Tensor) -> Tensor:
    """Without the part that comes from beyond the edge."""
    return image[..., 12:-12, 12:-12]


def test_nothing_flips_and_whole_pixels_are_indexing_bit_for_bit():
    image = torch.randn(1, 3, 12, 8)
    assert torch.equal(transformed(image, label()), image)
    assert torch.equal(transformed(image, label(flip_x=1)), image.flip(3))
    assert torch.equal(transformed(image, label(flip_y=1)), image.flip(2))
    assert torch.equal(transformed(image, label(flip_x=1, flip_y=1)), image.flip(2, 3))
    mirrored = torch.cat([image.flip(3), image, image.flip(3)], dim=3)
    for pixels in (-3, 1, 8):  # of a width of 8, where one pixel is a label of 1
        assert torch.equal(transformed(image, label(right=pixels)), mirrored[..., 8 - pixels : 16 - pixels])
    mirrored = torch.cat([image.flip(2), image, image.flip(2)], dim=2)
    assert torch.equal(transformed(image, label(down=16 / 12)), mirrored[..., 10:22, :])
    both = transformed(image, label(flip_x=1, right=2))
    assert torch.equal(both[..., 2:], image.flip(3)[..., :-2]), "the flip comes first"


@pytest.mark.parametrize(
    ("told", "matrix"),
    [
        (rotation(0.5), [[math.cos(0.5), math.sin(0.5)], [-math.sin(0.5), math.cos(0.5)]]),
        (label(scale=2), [[2**-0.4, 0], [0, 2**-0.4]]),
        (label(scale=-2), [[2**0.4, 0], [0, 2**0.4]]),
        (anisotropy(2, 0), [[2**-0.4, 0], [0, 2**0.4]]),
        (anisotropy(2, math.pi / 2), [[2**0.4, 0], [0, 2**-0.4]]),
    ],
)
def test_the_image_is_seen_through_the_map_of_the_paper(told: Tensor, matrix: list):
    torch.testing.assert_close(source_matrices(told.double())[0], torch.tensor(matrix).double(), atol=1e-7, rtol=0)
    got = transformed(wave(48, 64), told)
    assert (middle(got) - middle(wave(48, 64, torch.tensor(matrix)))).abs().max() < 0.02
    assert (middle(got) - middle(wave(48, 64))).abs().max() > 0.2


def test_a_stretch_along_a_direction_is_a_rotated_stretch():
    turn = torch.linalg.inv(source_matrices(rotation(0.7).double()))[0]
    expected = turn @ source_matrices(anisotropy(1.5, 0).double())[0] @ turn.T
    torch.testing.assert_close(source_matrices(anisotropy(1.5, 0.7).double())[0], expected, atol=1e-6, rtol=0)


def test_a_shift_between_pixels_and_the_order_of_all():
    shift = torch.tensor([0.3 * 64 / 8, -0.2 * 48 / 8])
    got = transformed(wave(48, 64), label(right=0.3, down=-0.2))
    assert (middle(got) - middle(wave(48, 64, shift=shift))).abs().max() < 0.02
    told = label(flip_x=1, scale=1, right=0.3, down=-0.2) + rotation(0.4) + anisotropy(1, 0.9)
    parts = [label(flip_x=1), label(scale=1), rotation(0.4), anisotropy(1, 0.9)]
    first, *others = (source_matrices(part.double())[0] for part in parts)
    for matrix in others:  # the inverse of the last acts first on a point of the transformed image
        first = first @ matrix
    torch.testing.assert_close(source_matrices(told.double())[0], first)
    expected = wave(48, 64, first, shift)
    assert (middle(transformed(wave(48, 64), told)) - middle(expected)).abs().max() < 0.02


def test_shrinking_averages_what_is_finer_than_a_pixel():
    stripes = (torch.arange(48) % 2).double().mul(2).sub(1).expand(1, 1, 48, 48)
    small = transformed(stripes, label(scale=-5.0001))  # by a factor of two: every pixel holds one stripe of each sign
    assert middle(small).abs().max() < 0.1
    assert torch.equal(transformed(torch.ones(1, 1, 8, 8), label(scale=-3)).round(decimals=5), torch.ones(1, 1, 8, 8))


def test_labels_are_drawn_as_in_the_paper():
    labels = draw_labels(generator(), 0.25)
    share = (labels != 0).double().mean(dim=0)
    expected = torch.tensor([0.5, 0.125, *(7 * [0.25])], dtype=torch.float64)
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / len(labels))
    always = draw_labels(generator(), 1.0)
    assert (always[:, [2, 7, 8]].std(dim=0) - 1).abs().max() < 0.1
    assert (torch.hypot(always[:, 3] + 1, always[:, 4]) - 1).abs().max() < 1e-6
    assert always[:, 3:5].mean(dim=0).sub(torch.tensor([-1.0, 0.0])).abs().max() < 0.1
    assert (torch.hypot(always[:, 5], always[:, 6]).square().mean() - 1).abs() < 0.2
    never = draw_labels(generator(), 0.0)
    assert never[:, 1:].count_nonzero() == 0 and 800 < never[:, 0].sum() < 1200, "the x-flip always draws its coin"


def test_the_label_identifies_the_transformation():
    """One label, one map; and maps that differ have labels that differ, flips with rotations aside."""
    labels = draw_labels(generator(range(400)), 1.0).double()
    labels[:, :2] = 0
    maps = torch.cat([source_matrices(labels).flatten(1), labels[:, 7:]], dim=1)
    apart = torch.ones(400, 400).triu(1).bool()
    ratio = (torch.cdist(maps, maps) / torch.cdist(labels, labels))[apart]
    assert ratio.min() > 0.02 and ratio.max() < 10
    opposite = anisotropy(1.5, 0.3), anisotropy(-1.5, 0.3 + math.pi / 2), anisotropy(1.5, 0.3 + math.pi)
    for same in opposite[1:]:
        torch.testing.assert_close(opposite[0], same, atol=1e-6, rtol=0)
    # What the paper's (a cos b, a sin b) confuses: a stretch, and the shrinking along the same line.
    assert (anisotropy(1.5, 0.3) - anisotropy(-1.5, 0.3 + math.pi)).abs().max() > 1


def diffusion(augmentation: float) -> Diffusion:
    made = build_objective(EdmObjective(name="edm", augmentation=augmentation), Data(0.5, 10), (1, 8, 8))
    assert isinstance(made, Diffusion)
    return made


def batch(size: int) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(size, 1, 8, 8), torch.arange(size) % 10)


def test_augmentation_changes_no_other_draw_and_no_split_of_the_batch_changes_it():
    whole, some = batch(64), diffusion(0.5).draw(generator(range(64), Purpose.TRAINING), batch(64), START)
    plain = diffusion(0.0).draw(generator(range(64), Purpose.TRAINING), whole, START)
    assert plain.augmentation is None and torch.equal(plain.x0, whole.x0)
    assert all(torch.equal(getattr(plain, name), getattr(some, name)) for name in ("z", "t", "labels"))
    for part in (slice(0, 5), slice(5, 64)):
        positions = torch.arange(64)[part]
        half = Batch(whole.x0[part], whole.labels[part])
        draws = diffusion(0.5).draw(generator(positions, Purpose.TRAINING), half, START)
        assert draws.augmentation is not None and some.augmentation is not None
        assert torch.equal(draws.x0, some.x0[part]) and torch.equal(draws.augmentation, some.augmentation[part])
    unchanged = (some.augmentation == 0).all(dim=1)
    assert unchanged.any() and torch.equal(some.x0[unchanged], whole.x0[unchanged]), "told zero: untransformed"
    flipped = (some.augmentation[:, 0] == 1) & (some.augmentation[:, 1:] == 0).all(dim=1)
    assert flipped.any() and torch.equal(some.x0[flipped], whole.x0[flipped].flip(3))


def network(augmented: bool):
    torch.manual_seed(2)
    made = build_network(DiTOptions(width=16, depth=1, heads=2), 1, 8, 8, Conditioning(10, augmented=augmented))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def test_the_network_is_told_and_zero_is_nothing():
    told, labels = network(True), draw_labels(generator(range(4)), 1.0)
    x, t, classes = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    drawing = told(x, t, classes)[0]
    torch.testing.assert_close(told(x, t, classes, None, None, torch.zeros(4, AUGMENTATION_LABELS))[0], drawing)
    assert (told(x, t, classes, None, None, labels)[0] - drawing).abs().max() > 0.01
    with pytest.raises(AssertionError, match="not told"):
        network(False)(x, t, classes, None, None, labels)


def test_the_label_reaches_the_network_in_training():
    objective, student = diffusion(0.9), network(True)
    draws = objective.draw(generator(range(8), Purpose.TRAINING), batch(8), START)
    networks = Networks(student, single_pass)
    loss = objective.loss(draws, networks).per_sample
    loss.mean().backward()
    weight = student.condition.augmentation.weight
    assert weight.grad is not None and weight.grad.abs().sum(dim=0).min() > 0, "of all nine numbers"
    silent = objective.loss(replace(draws, augmentation=None), networks).per_sample
    assert (loss - silent).abs().max() > 1e-3
