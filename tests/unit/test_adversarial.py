"""The discriminator, its hinge loss, and its place in CTM."""

from dataclasses import replace

import pytest
import torch
from test_trajectory import SHAPE, B, drawn, objective, small_network, teacher

from models.discriminator import Discriminator
from models.tangent.engines import single_pass
from sctrain.objectives.adversarial import judgement, realism
from sctrain.objectives.base import Adversary, Networks
from sctrain.objectives.trajectory import TRUST


def test_hinge():
    """-D(fake), and max(0, 1 - D(real)) + max(0, 1 + D(fake)), over patches: nothing beyond the margins."""
    level = torch.tensor([2.0, 0.5, -3.0])[:, None, None, None].expand(3, *SHAPE)
    labels = torch.zeros(3, dtype=torch.long)

    def judge(x, labels):
        return x.flatten(1)

    torch.testing.assert_close(realism(judge, level, labels), torch.tensor([-2.0, -0.5, 3.0]))
    torch.testing.assert_close(judgement(judge, level, -level, labels), torch.tensor([0.0, 1.0, 8.0]))
    mixed = torch.tensor([3.0, -1.0]).repeat(32).reshape(1, *SHAPE)  # half of the patches beyond the margin
    torch.testing.assert_close(judgement(judge, mixed, -mixed, labels[:1]), torch.tensor([2.0]))


@pytest.mark.parametrize(("side", "patches"), [(8, 4 * 4 + 2 * 2), (32, 16**2 + 8**2 + 4**2), (4, 2 * 2)])
def test_discriminator_sees_several_scales_and_every_sample_alone(side, patches):
    network, x = Discriminator(8, 3, side, side, 10), torch.randn(5, 3, side, side)
    labels = torch.tensor([0, 3, 3, 10, 9])
    logits = network(x, labels)
    assert logits.shape == (5, patches)
    torch.testing.assert_close(logits[2:3], network(x[2:3], labels[2:3]))
    assert not torch.allclose(logits[2:3], network(x[2:3], labels[4:5])), "it knows the class"


def test_discriminator_learns_to_tell_images_apart():
    network, labels = Discriminator(8, *SHAPE, 10), torch.arange(64) % 10
    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    rows, columns = torch.arange(8.0)[:, None], torch.arange(8.0)

    def images():
        phase = 6.28 * torch.rand(64, 1, 1, 1)
        return (rows + phase).sin().expand(64, 1, 8, 8), (columns + phase).sin().expand(64, 1, 8, 8)

    for _ in range(150):
        adam.zero_grad()
        judgement(network, *images(), labels).mean().backward()
        adam.step()
    real, fake = (network(x, labels).mean(1) for x in images())
    assert (real > 0).double().mean() > 0.95 and (fake < 0).double().mean() > 0.95


def networks(judge) -> Networks:
    student, target = small_network(1), small_network(2).requires_grad_(False)
    return Networks(student, single_pass, teacher, target, adversary=Adversary(judge, judge))


def test_the_discriminator_begins_after_its_part_of_the_budget():
    made = objective(adversary_after=0.5)
    assert [drawn(made, images=images).judged for images in (0, 499, 500, 1000)] == [False, False, True, True]
    assert not drawn(objective(), images=1000).judged
    plain = made.loss(drawn(made, images=499), networks(None))
    assert plain.beside is None and "adversarial" not in plain.diagnostics


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_each_side_has_gradients_of_its_own_loss_alone(scale):
    """Lambda_GAN makes its gradient as long as the matching term's, unless that takes it beyond [0.01, 10]."""
    made = objective(adversary_after=0.0, denoising=0.0)
    module = Discriminator(8, *SHAPE, 10).double()
    nets = networks(lambda x, labels: scale * module(x.double(), labels))
    draws = drawn(made)
    loss = made.loss(draws, nets)
    matched = made.loss(replace(draws, judged=False), nets)
    balance = loss.diagnostics["adversarial_balance"]
    low, high = TRUST
    assert torch.equal(balance, balance[:1].expand(B)) and low <= balance[0] <= high
    assert (balance[0] == {1e-9: high, 1e9: low}.get(scale, balance[0])).item()
    torch.testing.assert_close(
        loss.per_sample, matched.per_sample + balance * loss.diagnostics["adversarial"], rtol=1e-9, atol=1e-12
    )
    loss.per_sample.mean().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    weight = nets.student.head.weight
    assert weight.grad.norm() > 0
    before = weight.grad.clone()
    loss.beside.mean().backward()
    assert torch.equal(weight.grad, before) and module.scales[0].verdict.weight.grad.isfinite().all()
