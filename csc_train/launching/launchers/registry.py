"""Find the launcher of a cluster, including those that plugins register."""

from csc_train.config.cluster import ClusterConfig
from csc_train.errors import check_choice
from csc_train.launching.launchers import kubernetes, local, skypilot, slurm
from csc_train.launching.launchers.base import LAUNCHERS, Launcher

BUILT_IN = (local.LocalLauncher, slurm.SlurmLauncher, kubernetes.KubernetesLauncher, skypilot.SkyPilotLauncher)
"""Launchers of this package; importing their modules registers them."""


def launcher_class(cluster: ClusterConfig) -> type[Launcher]:
    """The launcher class of `cluster.scheduler`.

    Raises:
        InputError: no launcher has this name.
    """
    check_choice("cluster.scheduler", cluster.scheduler, LAUNCHERS)
    return LAUNCHERS[cluster.scheduler]
