"""Latent diffusion told by captions: Stable Diffusion (arXiv 2112.10752).

The autoencoder and the text encoder are frozen. Latents are coupled after encoding and scaling; an
offset of the noise is added after the coupling, so that it is not what the pairing is made by.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .config import RecipeError, StableDiffusion
from .data import Source
from .ddim import DiffusionObjective
from .export import save_pipeline
from .models import VERSION_1, align
from .objective import Generators, Mixed
from .randomness import Draws

# The noise schedule of Stable Diffusion 1.x.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

# The frozen networks of Stable Diffusion 1.x.
AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}
TINY_AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 8,
}
TINY_WORDS = 2 * 256 + 2  # bytes within and at the end of a word, start and end of the text
TINY_TEXT = {
    "vocab_size": TINY_WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "bos_token_id": TINY_WORDS - 2,
    "eos_token_id": TINY_WORDS - 1,
    "pad_token_id": TINY_WORDS - 1,
}


class StableDiffusionObjective(DiffusionObjective):
    """Diffusion of latents.

    Parameters
    ----------
    config : StableDiffusion
        The recipe's section.
    source : Source
        Its images are encoded, the names of its classes are the captions.
    blank : bool
        Build the frozen networks of a known pipeline without its weights, to count them.
    """

    pipeline_name = "StableDiffusionPipeline"
    config: StableDiffusion

    def __init__(self, config: StableDiffusion, source: Source, *, blank: bool = False) -> None:
        self.scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type=config.prediction)
        vae, text_encoder, tokenizer = (blank_frozen if blank else load_frozen)(config)
        for network in (vae, text_encoder):
            nn.Module.to(network, DTYPES[config.frozen_precision])  # diffusers' own warns
            align(network.eval().requires_grad_(False))
        channels, height, width = source.shape
        if config.caption == "class" and source.classes == [""]:
            msg = "objective.caption: got 'class', but the data has no names of classes: expected empty"
            raise RecipeError(msg)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if height % factor or width % factor or channels not in (1, 3):
            msg = (
                f"objective.pretrained: got images of {channels} x {height} x {width}, expected 1 or 3 channels and "
                f"sides that are multiples of {factor}, the autoencoder's factor"
            )
            raise RecipeError(msg)
        super().__init__(config, (vae.config.latent_channels, height // factor, width // factor))
        self.image_channels = channels
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.caption_width = text_encoder.config.hidden_size
        self.captions = ["", *source.classes]
        self._told: Tensor | None = None  # embeddings of the captions, made at first use

    def describe(self, labels: Tensor) -> Tensor:
        """Return ``(n, tokens, caption_width)`` embeddings of the classes' names; label -1 is the empty caption."""
        if self._told is None or self._told.device != labels.device:
            self._told = self._embeddings(labels.device)
        return self._told[labels + 1]

    def _embeddings(self, device: torch.device) -> Tensor:
        """Return the embeddings of all captions that the recipe may ask for."""
        told = self.captions if self.config.caption == "class" else self.captions[:1]
        tokens = self.tokenizer(
            told,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            # In evaluation mode and one at a time: a caption's embedding depends on nothing else.
            rows = tokens.input_ids.to(device).split(1)
            return torch.cat([self.text_encoder(row)[0].float() for row in rows])

    def encode(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return scaled latents of images in [-1, 1]."""
        pixels = images.expand(-1, self.vae.config.in_channels, -1, -1).to(self.vae.dtype)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            latents = self.vae.encode(pixels).latent_dist.sample(generator)
        return latents.float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [-1, 1], with as many channels as the data."""
        with torch.no_grad():
            images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = images.float().clamp(-1, 1)
        return images if images.shape[1] == self.image_channels else images.mean(1, keepdim=True)

    def prepare(self, images: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Any]]:
        """Encode the images and their captions."""
        told = labels if self.config.caption == "class" else torch.full_like(labels, -1)
        silent = torch.rand(len(told), generator=draws.generator("caption"), device=told.device)
        told = torch.where(silent < self.config.caption_dropout, -1, told)
        latents = self.encode(images, draws.generator("encode"))
        return latents, {"captions": self.describe(told)}

    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Mixed:
        """Add noise, shifted by the offset, at uniformly drawn levels."""
        if self.config.noise_offset:
            generator = draws.generator("offset")
            shift = torch.randn(*data.shape[:2], 1, 1, generator=generator, device=data.device)
            noise = noise + self.config.noise_offset * shift
        return super().mix(data, noise, draws)

    def predict(self, model: nn.Module, inputs: Tensor, timesteps: Tensor, context: dict[str, Any]) -> Tensor:
        """Ask the network, told the captions."""
        return model(inputs, timesteps, encoder_hidden_states=context["captions"]).sample

    def sampler(self) -> DDIMScheduler | PNDMScheduler:
        """Return the sampling scheme."""
        if self.config.sampler == "ddim":
            return DDIMScheduler.from_config(self.scheduler.config)
        return PNDMScheduler(**SCHEDULE, prediction_type=self.config.prediction, skip_prk_steps=True)

    def sample(
        self, model: nn.Module, noise: Tensor, steps: int, generator: Generators = None, first: int = 0
    ) -> Tensor:
        """Denoise latents, guided if the recipe says so, and decode them."""
        numbers = torch.arange(first, first + len(noise), device=noise.device)
        silent = torch.full_like(numbers, -1)
        told = numbers % (len(self.captions) - 1) if self.config.caption == "class" else silent
        scale = self.config.guidance_scale
        context = self.describe(told)
        if scale > 1:
            context = torch.cat([self.describe(silent), context])
        scheduler = self.sampler()
        scheduler.set_timesteps(steps, device=noise.device)
        x = noise
        for t in scheduler.timesteps:
            asked = torch.cat([x, x]) if scale > 1 else x
            prediction = model(asked, t, encoder_hidden_states=context).sample
            if scale > 1:
                without, told_so = prediction.chunk(2)
                prediction = without + scale * (told_so - without)
            x = scheduler.step(prediction, t, x).prev_sample
        return self.decode(x)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a folder for ``StableDiffusionPipeline.from_pretrained``."""
        # In one number format: a pipeline opened without naming one would mix those of its parts.
        pipeline = StableDiffusionPipeline(
            vae=copy.deepcopy(self.vae).float(),
            text_encoder=copy.deepcopy(self.text_encoder).float(),
            tokenizer=self.tokenizer,
            unet=model,
            scheduler=self.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        prompt = self.captions[-1] if self.config.caption == "class" else ""
        arguments = f"{prompt!r}, guidance_scale={self.config.guidance_scale}, num_inference_steps=20"
        save_pipeline(pipeline, folder, arguments)


def blank_frozen(config: StableDiffusion) -> tuple[AutoencoderKL, CLIPTextModel, None]:
    """Build the frozen networks that a recipe names with weights of no meaning.

    Raises
    ------
    RecipeError
        If their sizes are neither known here nor in a local folder.
    """
    name, folder = config.pretrained, Path(config.pretrained)
    if (folder / "vae" / "config.json").is_file():
        vae: Any = AutoencoderKL.load_config(folder / "vae")
        text = CLIPTextConfig.from_pretrained(folder / "text_encoder")  # nosec B615: nothing is downloaded
    elif name == "tiny-random":
        vae, text = TINY_AUTOENCODER, CLIPTextConfig(**TINY_TEXT)
    elif name in VERSION_1:
        vae, text = AUTOENCODER, CLIPTextConfig(**TEXT)
    else:
        expected = f"a local folder, tiny-random or one of {', '.join(VERSION_1)}"
        msg = f"objective.pretrained: the sizes of {name!r} are not known here; expected {expected}"
        raise RecipeError(msg)
    return AutoencoderKL.from_config(vae), CLIPTextModel(text), None


def load_frozen(config: StableDiffusion) -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    """Load the autoencoder, the text encoder and the tokenizer."""
    name, dtype = config.pretrained, DTYPES[config.frozen_precision]
    if name == "tiny-random":
        return make_tiny()
    revision = config.revision
    vae = AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=dtype, revision=revision)
    text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=dtype, revision=revision)
    return vae, text_encoder, CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", revision=revision)


def make_tiny() -> tuple[AutoencoderKL, CLIPTextModel, CLIPTokenizer]:
    """Make a small random autoencoder (factor 2), text encoder and tokenizer, the same every time.

    Not by way of a file: transformers writes nothing on any but the first of several processes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae, text_encoder = AutoencoderKL(**TINY_AUTOENCODER), CLIPTextModel(CLIPTextConfig(**TINY_TEXT))
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return vae, text_encoder, CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
