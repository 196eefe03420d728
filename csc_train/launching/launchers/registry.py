"""Find the launcher of a cluster, including launchers from outside the package."""

import importlib

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import InputError, check_choice
from csc_train.launching.launchers import local, slurm
from csc_train.launching.launchers.base import LAUNCHERS, Launcher

BUILT_IN = (local.LocalLauncher, slurm.SlurmLauncher)
"""Launchers of this package; importing their modules registers them."""


def launcher_class(cluster: ClusterConfig) -> type[Launcher]:
    """The launcher class of `cluster.scheduler`, after an import of `cluster.launcher_module`.

    Raises:
        InputError: the module cannot be imported, it registers a faulty launcher, or no launcher has this name.
    """
    if cluster.launcher_module:
        try:
            importlib.import_module(cluster.launcher_module)
        except ImportError as error:
            raise InputError(
                f"cluster.launcher_module={cluster.launcher_module}: {error}: name a module on PYTHONPATH"
            ) from error
    check_choice("cluster.scheduler", cluster.scheduler, LAUNCHERS)
    return LAUNCHERS[cluster.scheduler]
