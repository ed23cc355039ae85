"""Faults on purpose: runs that are broken, files that are hostile."""
