"""Errors for unknown names and options: what arrived, what is known, what is closest."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Say that `name` is not a known `kind`, list the known ones and suggest the closest.

    Parameters
    ----------
    kind : str
        What the name stands for, such as ``"method"``.
    name : object
        What arrived.
    known : iterable of str
        The names that would have been accepted.

    Returns
    -------
    str
        The message of the error to raise.
    """
    known = sorted(known)
    close = get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."
