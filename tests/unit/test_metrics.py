"""Metrics against closed forms, and against torch-fidelity's own statistics."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from sctrain.evaluation.frechet import Moments, frechet_distance
from sctrain.evaluation.metrics import Manifold, class_agreement, mean_squared_distance, nearest_distance

D = 6


def features(n: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    return mean + std * torch.randn(n, D, dtype=torch.float64)


def exactly(mean: torch.Tensor, variances: torch.Tensor, count: int = 100) -> Moments:
    return Moments(count, mean, torch.diag(variances) * (count - 1))


def test_moments_of_blocks_equal_those_of_the_whole():
    x = features(1000, mean=1e4)  # far from zero: sums of squares would lose half of the digits
    whole, blocks = Moments.of(x), Moments.over([x[:1], x[1:700], x[700:700], x[700:]])
    assert blocks.count == 1000
    torch.testing.assert_close(blocks.mean, x.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(blocks.covariance, x.T.cov(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole.covariance, x.T.cov(), rtol=1e-10, atol=1e-12)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    means, variances = torch.rand(2, D, dtype=torch.float64), 0.1 + torch.rand(2, D, dtype=torch.float64)
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    distance = frechet_distance(exactly(means[0], variances[0]), exactly(means[1], variances[1]))
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_distance_agrees_with_torch_fidelity_from_features(capfd):
    x, y = features(300), features(200, mean=0.5, std=2.0)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(*theirs.values(), rel=1e-10)
    assert capfd.readouterr() == ("", "")


def test_distance_to_itself_is_zero_and_not_negative():
    moments = Moments.of(features(50))
    assert 0 <= frechet_distance(moments, moments) < 1e-8


def test_radius_is_the_distance_to_the_third_neighbour():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    assert Manifold.of(points, k=3).radii.tolist() == [7, 6, 4, 7]
    assert Manifold.of(points, k=1).radii.tolist() == [1, 1, 2, 4]
    assert Manifold.of(points, k=9).radii.tolist() == [7, 6, 4, 7]


def test_points_inside_some_ball_are_counted():
    manifold = Manifold(torch.tensor([[0.0], [10.0]]), torch.tensor([1.0, 2.0]))
    assert manifold.share_inside(torch.tensor([[0.5], [1.5], [8.5], [20.0]])) == 0.5


def test_precision_and_recall_tell_collapse_from_noise():
    real = Manifold.of(features(2100))  # more than one block

    def precision_recall(generated: torch.Tensor) -> tuple[float, float]:
        return real.share_inside(generated), Manifold.of(generated).share_inside(real.points)

    assert min(precision_recall(features(2100))) > 0.8
    precision, recall = precision_recall(features(2100, std=0.1))
    assert precision > 0.95 and recall < 0.05
    precision, recall = precision_recall(features(2100, std=4.0))
    assert precision < 0.3 and recall > 0.8


def test_nearest_distance_finds_copies_and_crosses_blocks():
    reference = torch.randint(0, 256, (1500, 1, 8, 8), dtype=torch.uint8)
    assert nearest_distance(reference[1400:], reference) == pytest.approx(0, abs=1e-4)
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    by_hand = [
        min(np.linalg.norm(image.astype(float).ravel() - other.astype(float).ravel()) for other in reference.numpy())
        for image in images.numpy()
    ]
    assert nearest_distance(images, reference) == pytest.approx(np.mean(by_hand), rel=1e-9)


def test_agreement_and_mean_squared_distance():
    assert class_agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    a = torch.randn(5, 1, 4, 4)
    assert mean_squared_distance(a, a + 0.5) == pytest.approx(0.25, rel=1e-6)
