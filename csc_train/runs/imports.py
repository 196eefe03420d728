"""Import large libraries without the optional packages that they load at once."""

import functools
import gc
import importlib
import importlib.metadata
import sys
from typing import Any

UNUSED = {"bitsandbytes": "peft", "scipy": "transformers", "wandb": "trl", "mlflow": "trl"}
"""Packages that a library (PEFT 0.21, transformers 5.23, TRL 1.16) loads on import, for functions that nothing here
calls: a quarter of the CPU time and modules. Who needs one imports it as usual, as PEFT does for 4-bit layers."""


def import_lean(*modules: str) -> None:
    """Import modules as if the `UNUSED` packages were not installed.

    A package stays visible if it is loaded, or if its library is: that has seen it already. The list of all installed
    packages, which transformers and TRL both read from their metadata, is read once.
    """
    if sys.modules.keys() >= {*modules}:
        return
    hidden = [name for name, library in UNUSED.items() if not {name, library} & sys.modules.keys()]
    listed = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = functools.cache(listed)
    gc.disable()  # nothing of a module's is garbage
    modules_by_name: Any = sys.modules
    modules_by_name.update(dict.fromkeys(hidden))  # None: as if it were not there
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        gc.freeze()  # later collections pass the modules over
        gc.enable()
        importlib.metadata.packages_distributions = listed
        for name in hidden:
            sys.modules.pop(name, None)
