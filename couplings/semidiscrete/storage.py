"""Plans and checkpoints in files: safetensors with a JSON description, replaced at once or not at all."""

from __future__ import annotations

import hashlib
import json
import operator
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["read", "require", "write"]

_FORMAT = 2


def require() -> None:
    """Raise the error that names the extra if safetensors is not installed."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        msg = "saving needs the package safetensors, which is not installed. Type: pip install 'couplings[cli]'"
        raise ImportError(msg) from error


def write(path: Path, kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and what describes them."""
    require()
    from safetensors.torch import save

    from couplings._files import written_atomically

    about = {"kind": kind, "format": _FORMAT, **about}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in an order that differs from run to run.
    described = _json({**about, "checksum": _checksum(about, held)})
    with written_atomically(path, force=True) as file:
        file.write(save(held, {"couplings.semidiscrete": described}))


def read(path: Path, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    IsADirectoryError
        If it is a folder.
    ValueError
        If it is damaged, of another kind, or lacks one of `names`.
    """
    require()
    from safetensors import safe_open

    if path.is_dir():
        msg = f"{path}: this is a folder; name a file in it."
        raise IsADirectoryError(msg)
    if not path.is_file():
        msg = f"{path}: no such file."
        raise FileNotFoundError(msg)
    try:
        with safe_open(path, framework="pt") as archive:
            about = json.loads(archive.metadata()["couplings.semidiscrete"])
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - no mapping
        if about["kind"] != kind or about["format"] != _FORMAT or any(name not in tensors for name in names):
            msg = f"holds a {about['kind']} of format {about['format']}"
            raise ValueError(msg)
        checksum = about.pop("checksum", None)
        if checksum not in (None, _checksum(about, tensors)):  # older files have none
            msg = "its content does not match its checksum"
            raise ValueError(msg)
    except Exception as error:
        msg = f"{path} is no {kind} of couplings.semidiscrete, or it is damaged ({type(error).__name__}: {error})."
        raise ValueError(msg) from error
    return tensors, about


def _json(about: dict[str, Any]) -> str:
    return json.dumps(about, default=operator.index)  # integers of NumPy too


def _checksum(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(_json(about).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
