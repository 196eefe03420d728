"""Import large libraries without the optional packages that they load at once."""

import functools
import importlib
import importlib.metadata
import sys

UNUSED = ("bitsandbytes", "scipy", "wandb")
"""Packages that PEFT 0.21, transformers 5.23 and TRL 1.16 load on import, for functions that nothing here calls: more
than a quarter of the CPU time and of the modules. Who needs one imports it as usual, as PEFT does for 4-bit layers."""


def import_lean(*modules: str) -> None:
    """Import modules as if the `UNUSED` packages were not installed; what is loaded already stays.

    The list of all installed packages, which transformers and TRL both read from their metadata, is read once.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    listed = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = functools.cache(listed)
    sys.modules.update(dict.fromkeys(hidden))  # None: as if it were not there
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        importlib.metadata.packages_distributions = listed
        for name in hidden:
            sys.modules.pop(name, None)
