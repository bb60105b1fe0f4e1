"""The U-Nets before EDM2, written from the papers: DDPM++, NCSN++ and ADM in one class, and their forms for sCM."""

from __future__ import annotations

from torch import Tensor, nn

from models.execution import Execution
from models.layers import Conditioning, WeightingHead
from models.tangent.dual import value_of
from models.unet_layers import CONDITION_FACTOR, Block, ImagePyramid, UNetCondition, drawn, group_norm
from models.unet_options import ADMOptions, UNetOptions
from models.unet_plan import Place, Plan, check_fit, planned


class UNet(nn.Module):
    """F(u, c_noise, label) and w. `u` is x_t / sigma_data, of unit variance."""

    def __init__(
        self,
        options: UNetOptions | ADMOptions,
        channels: int,
        height: int,
        width: int,
        told: Conditioning,
        execution: Execution,
    ):
        super().__init__()
        form, self.execution = options.form, execution
        plan = planned(
            height,
            options.channels,
            options.multipliers,
            options.blocks,
            options.attention,
            sparse=form.sparse_attention,
        )
        check_fit(plan, options.multipliers, height, width, options.head_channels)
        self.head_dim = max(_head_channels(options, place) for place in plan.attended)
        self.condition = UNetCondition(options.channels, form, options.time_scale, told)
        self.embed = drawn(nn.Conv2d(channels, options.channels, 3, padding=1), form)
        condition = CONDITION_FACTOR * options.channels

        def block(place: Place) -> Block:
            heads = place.outputs // _head_channels(options, place)
            return Block(place, condition, options.dropout, heads, form, execution)

        self.encoder = nn.ModuleList(block(place) for place in plan.encoder)
        self.decoder = nn.ModuleList(block(place) for place in plan.decoder)
        self.pyramid = nn.ModuleList(_pyramid(plan, channels, options) if form.image_pyramid else [])
        last = plan.decoder[-1].outputs
        self.norm, self.activation = group_norm(last, form), nn.SiLU()
        self.head = drawn(nn.Conv2d(last, channels, 3, padding=1), form, form.last_gain)
        self.weighting = WeightingHead(options.channels)
        self.sum_factor = form.sum_factor

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        labels: Tensor,
        guidance: Tensor | None = None,
        end: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), 4 x (B,), (B, 9) -> F (B, C, H, W) and log-weight (B,), in the dtype of `u`.

        `t` is what the network is told of the noise. The weights' dtype rules inside; what depends on t alone keeps the
        dtype of `t`.
        """
        dtype = self.head.weight.dtype
        condition = self.condition(t, labels, guidance, end, augmentation).to(dtype)
        kept = self._encoded(u.to(dtype), condition)
        x = kept[-1]
        for block in self.blocks("decoder"):
            appended = [kept.pop()] if block.place.appended else []
            x = self.execution.run(block, x, condition, *appended)
        value = self.head(self.activation(self.norm(x)))
        return value.to(u.dtype), self.weighting(value_of(t))  # nobody asks for the weight's tangent

    def blocks(self, room: str) -> list[Block]:
        """Those of the "encoder" or the "decoder", in the order in which they act."""
        return [block for block in getattr(self, room) if isinstance(block, Block)]

    def _encoded(self, image: Tensor, condition: Tensor) -> list[Tensor]:
        """What the encoder leaves the decoder, the embedded image first."""
        kept, pyramid = [self.embed(image)], iter(self.pyramid)
        for block in self.blocks("encoder"):
            x = self.execution.run(block, kept[-1], condition)
            if block.place.resampling == "down" and self.pyramid:
                x = image = (x + next(pyramid)(image)) * self.sum_factor
            kept.append(x)
        return kept


def _pyramid(plan: Plan, channels: int, options: UNetOptions | ADMOptions) -> list[nn.Module]:
    """One for each level but the first; each is given what the one above made."""
    outputs = [place.outputs for place in plan.encoder if place.resampling == "down"]
    return [ImagePyramid(*pair, options.form) for pair in zip([channels, *outputs[:-1]], outputs, strict=True)]


def _head_channels(options: UNetOptions | ADMOptions, place: Place) -> int:
    return options.head_channels or place.outputs
