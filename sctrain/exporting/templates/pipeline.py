"""A consistency model of sctrain as a diffusers pipeline. It needs the package sctrain.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    pipe(class_labels=[1, 2, 3], num_inference_steps=2).images

Image number i of a seed has the same noise as image number i of `sctrain sample --seed`, and is the same image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SCMScheduler
from torch import Tensor

from sctrain.processes import ModelSpace
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.sampling import initial_noise, noised


class ConsistencyPipeline(DiffusionPipeline):
    """Multistep consistency sampling: the scheduler denoises, noise that belongs to each image comes on top."""

    model_cpu_offload_seq = "transformer->unet"
    _optional_components = ["transformer", "unet"]  # noqa: RUF012  (diffusers wants a list)

    def __init__(
        self,
        scheduler: SCMScheduler,
        transformer: Any = None,
        unet: Any = None,
        times: Sequence[Sequence[float]] = (),
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        latents: bool = False,
        guidance_scale: float | None = None,
    ):
        """`times` are those of one step, of two, ...; pixels in [0, 1], or latents, are x std / sigma_data + mean."""
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer, unet=unet)
        self.register_to_config(times=times, mean=mean, std=std, latents=latents, guidance_scale=guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        num_images: int = 1,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        seed: int = 0,
        timesteps: Sequence[float] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images number 0, 1, ... of `seed`; as many as `class_labels`, or `num_images` of balanced classes.

        `timesteps` descend from that of the noise, in radians. `latents` (N, C, H, W) take the place of that noise.
        output_type: "pil", "pt" (N, C, H, W) or "np" (N, H, W, C) in [0, 1]; "latent" is x. Models of latents give
        latents.
        """
        network = self.transformer if self.transformer is not None else self.unet
        sigma_data, shape, told = network.config.sigma_data, network.config.shape, network.config.told
        chosen = range(num_images) if class_labels is None else class_labels
        labels = torch.tensor([chosen] * num_images if isinstance(chosen, int) else list(chosen))
        labels = labels % told["num_classes"] if class_labels is None else labels
        indices = torch.arange(len(labels))
        noise = initial_noise(seed, indices, shape, sigma_data) if latents is None else latents
        x, labels = noise.to(network.device, network.dtype), labels.to(network.device)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if scale is not None and not told["guided"]:
            raise ValueError("this network was not told of guidance; leave guidance_scale away")
        guidance = None if scale is None else x.new_full((len(x),), scale)
        times = list(timesteps or self._times(num_inference_steps))
        self.scheduler.set_timesteps(
            len(times), timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None, device=x.device
        )
        fresh, idle = SampleGenerator(seed, indices, Purpose.FRESH_NOISE), torch.Generator(x.device)
        for number, time in enumerate(times):
            if number > 0:
                z = sigma_data * fresh.normal(x.shape[1:]).to(x)
                x = noised(x, z, time, sigma_data, network.config.anchor)
            F = network(x / sigma_data, x.new_full((len(x),), time), labels, guidance)
            # The scheduler's own noise, which belongs to no image, is left aside.
            step = self.scheduler.step(sigma_data * F, self.scheduler.timesteps[number], x, generator=idle)
            x = step.pred_original_sample
        images = self._converted(x, output_type, sigma_data)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _times(self, steps: int) -> Sequence[float]:
        if not 1 <= steps <= len(self.config.times):
            raise ValueError(f"num_inference_steps {steps} is not between 1 and {len(self.config.times)}")
        return self.config.times[steps - 1]

    def _converted(self, x: Tensor, output_type: str, sigma_data: float) -> Any:
        space = ModelSpace(tuple(self.config.mean), tuple(self.config.std), sigma_data)
        if output_type == "latent":
            return x
        images = (space.to_signed(x.float()) + 1) / 2
        images = images if self.config.latents else images.clamp(0, 1)
        if output_type == "pt" or (self.config.latents and output_type == "pil"):
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return images if output_type == "np" else self.numpy_to_pil(images)
