"""Sample a flow-matching model; a copy of this file travels in the exported folder as ``pipeline.py``.

>>> pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
>>> images = pipeline(batch_size=16, num_inference_steps=10).images

``class_conditional.py`` travels with it.
"""

# Types are written out, not postponed, and in the older form: diffusers before 0.37 reads those of __init__ so.
from typing import Optional

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .class_conditional import told


class FlowMatchingPipeline(DiffusionPipeline):
    """Integrate the velocity field of ``unet`` from noise at t = 1 to images at t = 0, by Euler steps.

    Parameters
    ----------
    unet : ModelMixin
        The velocity ``noise - data`` at ``x_t = (1 - t) data + t noise``; it is told ``1000 t``.
    classes : int, optional
        Classes that it can be told; None for an unconditional one.
    """

    def __init__(self, unet: torch.nn.Module, classes: Optional[int] = None) -> None:  # noqa: UP045
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(classes=classes)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: torch.Tensor | list[int] | None = None,
        guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Parameters
        ----------
        batch_size : int
            How many; as many as there are ``class_labels``.
        generator : torch.Generator, optional
            Source of the noise.
        num_inference_steps : int
            Euler steps, each one evaluation of the network.
        output_type : {"pil", "np"}
            PIL images, or an ``(n, h, w, c)`` array in [0, 1].
        return_dict : bool
            Return an `ImagePipelineOutput` rather than a tuple.
        class_labels : (n,) int Tensor or list, optional
            The class of each image, for a network that is told classes.
        guidance_scale : float
            Classifier-free guidance towards the class; 1 is none.

        Raises
        ------
        ValueError
            For classes that the network does not know, or guidance that it has not learned.
        """
        if class_labels is not None:
            batch_size = len(class_labels)
        config = self.unet.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        times = torch.linspace(1, 0, num_inference_steps + 1, device=x.device)
        with told(self.unet, class_labels, guidance_scale, self.config.classes):
            for i in self.progress_bar(range(num_inference_steps)):
                x = x + (times[i + 1] - times[i]) * self.unet(x, 1000 * times[i]).sample
        images = (x / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
