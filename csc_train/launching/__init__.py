"""From one machine to a cluster: what there is to run on, whether a job fits, and how it is started."""
