"""A Lightning callback that puts coupled noise into every training batch, and logs what the coupling gained.

For ``lightning`` and ``pytorch_lightning`` alike, whichever is imported or installed::

    trainer = Trainer(callbacks=[CoupledNoise(data="image", condition="label")])
    noise = batch["noise"]  # in training_step
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from importlib import import_module
from typing import Any

import torch

from couplings.coupling import Coupling
from couplings.noise import normal, row_seeds

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback() -> type | None:
    """Class that callbacks derive from: of the package that is imported already, or else installed; None without."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            found: type = import_module(name).Callback
        except ImportError:
            continue
        return found
    return None


_Callback: Any = _callback() or object


class CoupledNoise(_Callback):  # type: ignore[misc]
    """Draw noise for each training batch, couple it, and put it into the batch.

    A batch that is a dictionary gets ``batch[noise]``, a list (what ``DataLoader`` makes of tuples) one more element
    at its end.

    Parameters
    ----------
    coupling : Coupling, optional
        By default the exact coupling on squared distances.
    data : str or int
        Where the batch holds the data.
    noise : str
        Where to put the noise of a dictionary.
    condition : str or int, optional
        Where the batch holds the classes (or floating conditions) to couple within.
    seed : int
        Row i of batch b in epoch e on rank r has noise of its own, a function of these alone: a resumed run goes on
        with the same noise, and no two ranks share any.
    log : bool
        Log ``coupling/reduction`` at every step that logs.

    Raises
    ------
    ImportError
        Without Lightning.

    Notes
    -----
    With gradient accumulation each micro-batch is coupled by itself. The noise has the data's dtype and device. To
    couple what the module computes, such as latents, call `couplings.couple` in ``training_step``.
    """

    def __init__(
        self,
        coupling: Coupling | None = None,
        *,
        data: str | int = 0,
        noise: str = "noise",
        condition: str | int | None = None,
        seed: int = 0,
        log: bool = True,
    ) -> None:
        if _Callback is object:
            msg = "CoupledNoise needs Lightning, which is not installed. Type: pip install lightning"
            raise ImportError(msg)
        super().__init__()
        self.coupling, self.data, self.noise, self.condition = coupling or Coupling(), data, noise, condition
        self.seed, self.log = seed, log

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put coupled noise into the batch."""
        if not isinstance(batch, MutableMapping | list):
            msg = (
                f"CoupledNoise puts noise into a batch that is a dictionary or a list, got {type(batch).__name__}. "
                "Return one from the dataset, or call couplings.couple in training_step."
            )
            raise TypeError(msg)
        held: Any = batch
        images = held[self.data]
        # 2^32 batches an epoch and 2^20 rows a batch, far beyond any.
        place = (trainer.current_epoch << 52) + (batch_idx << 20)
        seeds = row_seeds(self.seed, place, len(images), stream=trainer.global_rank, device=images.device)
        drawn = normal(seeds, images.shape[1:], dtype=images.dtype)
        condition = None if self.condition is None else held[self.condition]
        coupled = self.coupling(images, drawn, condition=condition)
        if isinstance(batch, list):
            batch.append(coupled.noise)
        else:
            batch[self.noise] = coupled.noise
        if self.log:
            pl_module.log("coupling/reduction", coupled.reduction.to(torch.float32), on_step=True, on_epoch=False)
