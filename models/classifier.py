"""A small convolutional classifier: its last hidden layer gives the features of the Frechet distance.

Works for images of any size from 8x8 up. Features are taken before the activation: a dead ReLU there would make their
covariance singular.
"""

import torch
from torch import Tensor, nn

FEATURES = 64


class Classifier(nn.Module):
    """Halves the resolution until 4 rows or columns are left, then two linear layers. Initialised from `seed` alone."""

    def __init__(self, channels: int, height: int, width: int, num_classes: int, seed: int = 0):
        super().__init__()
        assert min(height, width) >= 8, "images of at least 8x8"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(*_stages(channels, min(height, width)), nn.AdaptiveAvgPool2d(4), nn.Flatten())
            planes = next(m.out_channels for m in reversed(self.trunk) if isinstance(m, nn.Conv2d))
            self.embed = nn.Linear(planes * 16, FEATURES)
            self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in [-1, 1] -> pre-activation features (B, 64) and logits (B, num_classes)."""
        features = self.embed(self.trunk(x))
        return features, self.head(torch.relu(features))


def _stages(channels: int, size: int) -> list[nn.Module]:
    """3x3 convolutions; each after the first halves the resolution, down to 4 to 7."""
    planes = 32
    layers = _convolution(channels, planes, stride=1)
    while size >= 8:
        layers += _convolution(planes, min(2 * planes, 128), stride=2)
        planes, size = min(2 * planes, 128), size // 2
    return layers


def _convolution(channels: int, planes: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, planes, 3, stride, padding=1), nn.GroupNorm(8, planes), nn.ReLU()]
