"""Compute: the port every engine meets (`api`) and one file per engine."""
