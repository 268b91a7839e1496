"""The error for an optional package that is not installed."""


def missing_extra(module: str, *, package: str, extra: str) -> ImportError:
    """Make the error that names the extra to install.

    Parameters
    ----------
    module : str
        The module of the method that needs it.
    package : str
        The package that could not be imported.
    extra : str
        The extra of couplings that brings it.
    """
    method = module.rpartition(".")[2]
    return ImportError(
        f"the method {method} needs the package {package}, which is not installed. "
        f"Type: pip install 'couplings[{extra}]'"
    )
