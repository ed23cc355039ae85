"""sfd-scale: train and evaluate Semantic-First Diffusion (arXiv 2512.04926)."""

from sfd_scale.runtime import environment

environment.prepare()  # before a library reads a variable or looks for a GPU
