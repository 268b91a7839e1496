"""The `couplings` command, also as ``python -m couplings``."""

import sys


def main() -> int:
    """Run the command, or say in one line what it lacks."""
    try:
        from couplings.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f"couplings: error: the command line needs {error.name}: pip install 'couplings[cli]'\n")
        return 2
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
