"""Every speed figure of the project: one command each, beside its peer in one run."""
