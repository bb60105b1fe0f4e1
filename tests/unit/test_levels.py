"""Curricula, grids and mappings against the values that the papers give."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sctrain.config.objectives import ConsistencyTraining, DiscreteTwin, EasyTuning, ImprovedTraining
from sctrain.objectives.levels import (
    FromData,
    Grid,
    LognormalPairs,
    MappedPairs,
    UniformPairs,
    ct_decay,
    ct_levels,
    ddim_times,
    ect_mapping,
    ect_stage,
    ict_levels,
    lognormal_cells,
)
from sctrain.processes import time_of
from sctrain.randomness import Purpose, SampleGenerator

BEFORE = 1e-6  # just before the end of a stage


def generator(count: int) -> SampleGenerator:
    return SampleGenerator(0, torch.arange(count), Purpose.TRAINING)


def test_grid():
    """EDM's eq. 5, written from the other end."""
    sigmas = Grid(0.002, 80.0, 7.0).levels(18)
    for i in range(18):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert sigmas[17 - i].item() == pytest.approx(expected, rel=1e-12)


def test_levels_of_ct():
    """N(0) = s0, N(K) = s1 + 1, and N grows by one where the root passes an integer."""
    assert ct_levels(0, 2, 150) == 2 and ct_levels(1, 2, 150) == 151 and ct_levels(1, 2, 200) == 201
    for n in range(3, 151):
        done = (n**2 - 2**2) / (151**2 - 2**2)  # the root is n
        assert ct_levels(done, 2, 150) == n and ct_levels(done + 1e-5, 2, 150) == n + 1


def test_decay_of_ct():
    assert ct_decay(2, 2, 0.9) == pytest.approx(0.9) and ct_decay(151, 2, 0.9) == pytest.approx(0.9 ** (2 / 151))
    assert ct_decay(2, 2, 0.0) == 0.0


def test_levels_of_ict_double_eight_times():
    for stage in range(8):
        assert ict_levels(stage / 8, 10, 1280) == 10 * 2**stage + 1
        assert ict_levels((stage + 1) / 8 - BEFORE, 10, 1280) == 10 * 2**stage + 1
    assert ict_levels(1.0, 10, 1280) == 1281


def test_levels_of_ict_reach_the_last_also_where_the_ratio_is_no_power_of_two():
    """K' = K / (log2 100 + 1): seven whole stages, and what is left of the eighth at s1."""
    stages = math.log2(100) + 1
    assert [ict_levels(k / stages, 10, 1000) for k in range(8)] == [11, 21, 41, 81, 161, 321, 641, 1001]
    assert ict_levels(7 / stages - BEFORE, 10, 1000) == 641 and ict_levels(1.0, 10, 1000) == 1001
    assert ict_levels(0.3, 10, 10) == 11


def test_cells_of_ict_hold_what_the_lognormal_has_there():
    sigmas = Grid().levels(41)
    normal = torch.distributions.Normal(torch.tensor(-1.1, dtype=torch.float64), 2.0)
    expected = normal.cdf(sigmas.log()).diff() / (normal.cdf(sigmas[-1].log()) - normal.cdf(sigmas[0].log()))
    torch.testing.assert_close(lognormal_cells(sigmas, -1.1, 2.0), expected, rtol=1e-9, atol=0)
    _, drawn = LognormalPairs(Grid(), 40, None, -1.1, 2.0).draw(generator(20_000), 0.0)
    counts = torch.bincount((drawn[:, None] > sigmas[:-1] * 0.999).sum(1) - 1, minlength=40) / 20_000
    assert (counts - expected).abs().max() < 4.5 * (expected.max() / 20_000).sqrt()


@pytest.mark.parametrize("pairs", [UniformPairs(Grid(), 5), LognormalPairs(Grid(), 4, None, -1.1, 2.0)])
def test_pairs_are_neighbours_and_all_are_drawn(pairs):
    sigmas = Grid().levels(5).tolist()
    drawn = set(zip(*(levels.tolist() for levels in pairs.draw(generator(2000), 0.5)), strict=True))
    assert drawn == set(zip(sigmas[1:], sigmas[:-1], strict=True))


def test_mapping_of_ect():
    """r = t (1 - (1 + 8 sigmoid(-t)) / 2^(a + 1)), zero where that is negative."""
    sigma = torch.tensor([0.01, 1.0, math.log(7), 2.5, 80.0], dtype=torch.float64)
    first = ect_mapping(sigma, 0, 2.0, 8.0, 1.0)
    assert first[:3].abs().max() < 1e-12 and first[3] > 0 and first[4].item() == pytest.approx(40)
    last = ect_mapping(sigma, 7, 2.0, 8.0, 1.0)
    assert last[1].item() == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 256)
    assert [ect_stage(done, 8) for done in (0, 1 / 8 - BEFORE, 1 / 8, 7 / 8, 1.0)] == [0, 0, 1, 7, 7]


def test_levels_of_ect_stay_where_float32_angles_differ():
    sigma, r = MappedPairs(6.0, 4.0, 8, 2.0, 8.0, 1.0, sigma_max=80.0).draw(generator(500), 1.0)
    t, s = ((level / 0.5).atan().float().double() for level in (sigma, r))
    assert sigma.max() == 80 and (sigma == 80).any() and (sigma < 80).any()
    gap = 0.5 * (t.tan() - s.tan())
    assert ((gap / (sigma - r) - 1).abs() < 0.01).all()


def gap_error(sigma: Tensor, lower: Tensor) -> float:
    """The worst relative error of the gap between two noise levels' times in float32; 1 where it is lost."""
    t, s = (time_of(level, 0.5) for level in (sigma, lower))
    return ((t.float().double() - s.float().double()) / (t - s) - 1).abs().max().item()


def test_what_configurations_allow_float32_can_resolve():
    """The closest levels that are not refused, up to sigma = 80: all gaps remain, and are what they should be."""
    most = DiscreteTwin(name="sct_discrete", levels=8192).levels
    for grid in (Grid(), FromData()):
        sigmas = grid.levels(most)
        assert gap_error(sigmas[1:], sigmas[:-1]) < 0.1
    with pytest.raises(ValidationError, match="less than or equal to 8192"):
        DiscreteTwin(name="sct_discrete", levels=8193)
    ect, sigma = EasyTuning(name="ect", stages=12), torch.logspace(-4, math.log10(80), 100_001, dtype=torch.float64)
    assert gap_error(sigma, ect_mapping(sigma, ect.stages - 1, ect.q, ect.k, ect.b)) < 0.1
    assert gap_error(sigma, ect_mapping(sigma, 15, ect.q, ect.k, ect.b)) == 1, "16 doublings lose some gaps"


def test_times_of_stable_diffusion():
    """alpha_bar of step 999 is 0.00466; the 50 of LCM are 19, 39, ..., 999, and below them is the clean image."""
    times = ddim_times(50)
    assert len(times) == 51 and times[0] == 0
    assert times[-1].cos().item() ** 2 == pytest.approx(0.00466, rel=1e-3)
    every = ddim_times(1000)
    assert every[1].cos().item() ** 2 == pytest.approx(1 - 0.00085)
    assert (every.diff() > 0).all() and torch.equal(every[[20, 40, 1000]], times[[1, 2, 50]])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ImprovedTraining(name="ict", first_levels=20, last_levels=10), "last_levels 10 is below"),
        (lambda: ConsistencyTraining(name="ct", first_levels=20, last_levels=10), "last_levels 10 is below"),
        (lambda: EasyTuning(name="ect", q=256.0, stages=3), "gaps of about t / 1.68e\\+07"),
        (lambda: EasyTuning(name="ect", stages=13), "which float32 cannot resolve; lower one of them, to at most 4096"),
    ],
)
def test_curricula_that_cannot_be_are_refused(make, said):
    with pytest.raises(ValidationError, match=said):
        make()
