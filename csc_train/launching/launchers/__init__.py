"""Launchers: start, watch and stop jobs on this machine or through a scheduler."""
