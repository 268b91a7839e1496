"""Latent diffusion that is told captions: Stable Diffusion (arXiv 2112.10752).

The autoencoder and the text encoder are frozen. Latents are coupled after encoding and scaling; an
offset of the noise is added after the coupling, so that it is not what the pairing is made by.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .config import closest, expect
from .data import Source
from .ddim import DiffusionObjective
from .models import VERSION_1, align
from .objective import Mixed, Told
from .pipelines import save_pipeline
from .randomness import Draws
from .sections import StableDiffusion

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
        Its images are encoded; the names of its classes, or a column of text, are the captions.
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
        caption, named = config.caption, source.classes != [""]
        expect(named or caption != "class", "objective.caption", caption, "empty: the data has no names of classes")
        if not blank and caption not in ("empty", "class"):
            known = [f"column:{name}" for name in source.texts]
            expected = " or ".join(known) + closest(caption, known) if known else "empty: the data has no text"
            expect(caption in known, "objective.caption", caption, expected)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        fits = channels in (1, 3) and height % factor == width % factor == 0
        sides = f"1 or 3 channels and sides that are multiples of {factor}, the autoencoder's factor"
        expect(fits, "objective.pretrained", config.pretrained, f"images of {sides}, not {tuple(source.shape)}")
        super().__init__(config, (vae.config.latent_channels, height // factor, width // factor))
        self.tells, self.dropout = None if caption == "empty" else caption, config.caption_dropout
        self.image_channels = channels
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.caption_width = text_encoder.config.hidden_size
        self.captions = ["", *source.classes]
        self._told: Tensor | None = None  # embeddings of the captions, made at first use

    def tell(self, told: Told) -> dict[str, Tensor]:
        """Return the embeddings of captions, or of the names of classes."""
        return {"encoder_hidden_states": self.describe(told)}

    def describe(self, told: Told) -> Tensor:
        """Return ``(n, tokens, caption_width)`` embeddings of captions, or of classes' names; -1 is the empty one."""
        if isinstance(told, list):
            return self._embeddings(told, len(told))
        if self._told is None or self._told.device != told.device:
            # One at a time: a caption's embedding depends on nothing else.
            self._told = self._embeddings(self.captions if self.tells == "class" else self.captions[:1], 1)
        return self._told[told + 1]

    def _embeddings(self, captions: list[str], at_once: int) -> Tensor:
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        rows = tokens.input_ids.to(self.text_encoder.device).split(at_once)
        with torch.no_grad(), torch.autocast(self.text_encoder.device.type, enabled=False):
            return torch.cat([self.text_encoder(row)[0].float() for row in rows])

    def encode(self, images: Tensor, draws: Draws) -> Tensor:
        """Return scaled latents of images in [-1, 1]."""
        return self.latents(self.posterior(images), draws)

    def posterior(self, images: Tensor) -> Tensor:
        """Return the ``(n, 2 c, h, w)`` mean and logarithm of the variance of the latents of images, before scaling."""
        pixels = images.expand(-1, self.vae.config.in_channels, -1, -1).to(self.vae.dtype)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(pixels).latent_dist.parameters

    def latents(self, posterior: Tensor, draws: Draws) -> Tensor:
        """Draw scaled latents."""
        drawn = DiagonalGaussianDistribution(posterior).sample(draws.generator("encode"))
        return drawn.float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [-1, 1], with as many channels as the data."""
        with torch.no_grad():
            images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = images.float().clamp(-1, 1)
        return images if images.shape[1] == self.image_channels else images.mean(1, keepdim=True)

    def mix(self, data: Tensor, noise: Tensor, draws: Draws) -> Mixed:
        """Add noise, shifted by the offset, at uniformly drawn levels."""
        if self.config.noise_offset:
            generator = draws.generator("offset")
            shift = torch.randn(*data.shape[:2], 1, 1, generator=generator, device=data.device)
            noise = noise + self.config.noise_offset * shift
        return super().mix(data, noise, draws)

    def sampler(self) -> DDIMScheduler | PNDMScheduler:
        """Return the sampling scheme."""
        if self.config.sampler == "ddim":
            return super().sampler()
        return PNDMScheduler(**SCHEDULE, prediction_type=self.config.prediction, skip_prk_steps=True)

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
        prompt = {None: "", "class": self.captions[-1]}.get(self.tells, "a caption")
        arguments = f"{prompt!r}, guidance_scale={self.config.guidance_scale}, num_inference_steps=20"
        save_pipeline(pipeline, folder, arguments, self)


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
    else:
        known = f"a local folder, tiny-random or one of {', '.join(VERSION_1)}, whose sizes are known here"
        expect(name in VERSION_1, "objective.pretrained", name, known)
        vae, text = AUTOENCODER, CLIPTextConfig(**TEXT)
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
