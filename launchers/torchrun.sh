#!/usr/bin/env bash
# torchrun, one command a node: static node ranks, or RENDEZVOUS=c10d for elastic restarts.
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 launchers/torchrun.sh train RECIPE [key=value ...]
#   NODES=2:4 RENDEZVOUS=c10d JOB_ID=a MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 launchers/torchrun.sh train RECIPE [...]
# Environment: also RANKS (processes a node), MAX_RESTARTS, SHUTDOWN_TIMEOUT, LOG_FOLDER: docs/multinode.md.
exec python -m sfd_scale.launch torchrun "$@"
