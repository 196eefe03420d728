"""Launch jobs: preflight checks, launchers for this machine and SLURM, and sweeps."""
