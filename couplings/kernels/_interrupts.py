"""What signals raise while a kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

__all__ = ["interruptible"]

F = TypeVar("F", bound=Callable[..., Any])


def interruptible(function: F) -> F:
    """Raise what a signal raised in a kernel, such as KeyboardInterrupt, where Numba makes a SystemError of it."""

    @wraps(function)
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SystemError as error:
            cause: BaseException = error
            while cause.__cause__ is not None and str(cause).endswith("returned a result with an exception set"):
                cause = cause.__cause__
            if cause is error:
                raise
        raise cause.with_traceback(None) from None

    return cast(F, interrupted)
