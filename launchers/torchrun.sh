#!/usr/bin/env bash
# torchrun: one command per node. Node ranks are static, or RENDEZVOUS=c10d allows elastic restarts.
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 launchers/torchrun.sh train RECIPE [key=value ...]
#   NODES=2:4 RENDEZVOUS=c10d JOB_ID=a MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 launchers/torchrun.sh train RECIPE [...]
# Environment: also RANKS (processes per node), MAX_RESTARTS, SHUTDOWN_TIMEOUT, LOG_FOLDER. See docs/multinode.md.
exec python -m sfd_scale.launch torchrun "$@"
