"""One rank of the peer of the start-up benchmark: import torch, wrap one block of the baseline in DDP, do one step."""

from __future__ import annotations

import time

_stamps = {"rank": time.time()}  # before any slow import

# ruff: noqa: E402
import json
import sys
from pathlib import Path


def main() -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.peer import NULL_LABEL, SEMANTIC, SIDE, TEXTURE, Peer, peer_loss

    _stamps["imports"] = time.time()
    dist.init_process_group("gloo")
    _stamps["group"] = time.time()
    model = DistributedDataParallel(Peer("S", depth=1).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    _stamps["engine"] = time.time()
    latents, noise = (torch.randn(1, TEXTURE + SEMANTIC, SIDE, SIDE) for _ in range(2))
    features, labels = torch.randn(1, 768, SIDE, SIDE), torch.full((1,), NULL_LABEL)
    peer_loss(model, latents, features, labels, noise, torch.rand(1)).backward()
    optimizer.step()
    _stamps["step"] = time.time()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(_stamps), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
