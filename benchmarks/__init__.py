"""Benchmarks: one command for every speed figure of the project, which runs ours and a peer in turns."""
