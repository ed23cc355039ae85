"""The first minutes on a GPU: correctness and throughput of the real model sizes, in nine parts (`__main__`)."""
