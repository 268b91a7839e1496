"""What `torch.compile` must not trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Let `torch.compile` break its graph at a function: `torch.compiler.disable`, without importing the compiler."""
    disabled: Callable[..., Any] | None = None

    @wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    outside.__dict__["_torchdynamo_disable"] = True
    # The compiler calls it where its graph has ended, and would trace that call by itself, for every new shape.
    with suppress(AttributeError):  # what `torch._dynamo.skip` does; without it compiling takes longer
        frames = torch._C._dynamo.eval_frame
        strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(cast(FunctionType, outside).__code__, strategy)
    return cast(F, outside)
