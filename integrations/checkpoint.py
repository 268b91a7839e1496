"""Checkpoints: tensors in safetensors, everything else in JSON, whole or not there at all.

A checkpoint is a folder ``step-<N>``. It is written under another name, flushed to disk and then
renamed, so a reader never sees half of one; ``state.json`` holds a checksum of every other file and of
itself, so damage done later is noticed too. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)")
_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose checksums agree."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load one group of tensors."""
        # The file maps tensors at odd addresses, where kernels round differently; copies are aligned,
        # and a resumed run continues bit for bit.
        return {key: value.clone() for key, value in load_file(self.folder / f"{name}.safetensors").items()}


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], texts: dict[str, str]
) -> Path:
    """Write the checkpoint of ``step`` into ``folder``.

    Parameters
    ----------
    folder : Path
        Where checkpoints lie.
    step : int
        Optimizer steps done.
    tensors : dict
        Groups of named tensors, one file each.
    state : dict
        JSON values.
    texts : dict
        Further files by name.

    Raises
    ------
    CheckpointError
        If the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step}"
    partial = folder / f".step-{step}.partial"
    try:
        for remains in folder.glob(".step-*"):  # of a process that was killed while it wrote or deleted
            shutil.rmtree(remains, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            plain = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(plain, partial / f"{name}.safetensors")
        for name, text in texts.items():
            (partial / name).write_text(text)
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        document = {"step": step, "files": files, **state}
        document["checksum"] = _checksum(document)
        (partial / "state.json").write_text(json.dumps(document, indent=1))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except Exception as error:  # safetensors reports a full disk by its own exception type
        shutil.rmtree(partial, ignore_errors=True)
        msg = f"could not write the checkpoint of step {step} to {folder}: {error}"
        raise CheckpointError(msg) from error
    return final


def read(folder: Path) -> Checkpoint:
    """Open one checkpoint folder, verifying its checksums.

    Raises
    ------
    CheckpointError
        If it is incomplete or damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        for name, digest in state["files"].items():
            if _sha256(folder / name) != digest:
                msg = f"{folder}: {name} does not match its checksum"
                raise CheckpointError(msg)
        checksum = state.pop("checksum", None)
        if checksum not in (None, _checksum(state)):  # older checkpoints have none
            msg = f"{folder}: state.json does not match its checksum"
            raise CheckpointError(msg)
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:  # whatever JSON it may hold
        msg = f"{folder}: incomplete checkpoint ({type(error).__name__}: {error})"
        raise CheckpointError(msg) from None
    return Checkpoint(folder, state["step"], state)


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint in ``folder``, ascending, without verifying them."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def newest(folder: Path) -> Checkpoint | None:
    """Open the newest intact checkpoint; damaged ones are reported and passed over."""
    for step in reversed(steps(folder)):
        try:
            return read(folder / f"step-{step}")
        except CheckpointError as error:
            log.warning("%s; using the checkpoint before it", error)
    return None


def find(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run's folder.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged.
    """
    if (path / "state.json").is_file():
        return read(path)
    found = newest(path / "checkpoints")
    if found is None:
        msg = f"{path}: no checkpoint; expected a run's folder or one of its checkpoints/step-<N>"
        raise CheckpointError(msg)
    return found


def weights(path: Path) -> dict[str, Tensor]:
    """Load the weights of a network.

    Parameters
    ----------
    path : Path
        A checkpoint or a run's folder, of whose newest checkpoint the averaged weights are taken; a pipeline's folder
        or its ``unet``; or a safetensors file.

    Raises
    ------
    CheckpointError
        If there are none.
    """
    if (path / "state.json").is_file() or (path / "checkpoints").is_dir():
        found = find(path)
        return {**found.tensors("model"), **found.tensors("ema")}
    inside = [*(path / "unet").glob("*"), *path.glob("*")]
    files = [path] if path.is_file() else [file for file in inside if _WEIGHTS.fullmatch(file.name)]
    try:
        loaded = [load_file(file) for file in files]
    except (SafetensorError, OSError) as error:
        msg = f"{path} cannot be read: {error}"
        raise CheckpointError(msg) from error
    if not loaded:
        msg = f"{path} is no checkpoint, run, pipeline or .safetensors file"
        raise CheckpointError(msg)
    return {name: value for group in loaded for name, value in group.items()}


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for step in steps(folder)[:-keep]:
        # Renamed first: a deletion that is interrupted must not look like a checkpoint.
        doomed = folder / f".step-{step}.old"
        (folder / f"step-{step}").rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON values."""
    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for row, values in full["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{row}.{key}"] = value
    return tensors, {"scalars": scalars, "param_groups": full["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Undo `optimizer_state`."""
    state: dict[int, dict[str, Any]] = {}
    for address, value in {**tensors, **plain["scalars"]}.items():
        row, key = address.split(".", 1)
        state.setdefault(int(row), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
    for weight, values in optimizer.state.items():
        for key, value in values.items():
            # Laid out in memory as the weight is, which fused updates need.
            if isinstance(value, Tensor) and value.shape == weight.shape and key != "step":
                values[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
