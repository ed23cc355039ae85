#!/usr/bin/env bash
# torchrun with a static rendezvous: one command a node. (The c10d one hangs where host names resolve to loopback.).
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launchers/torchrun.sh train RECIPE [key=value ...]
# Environment: NODES, NODE_RANK, RANKS (processes a node), MASTER_ADDR, MASTER_PORT, SHUTDOWN_TIMEOUT (seconds for a save).
set -euo pipefail
module=sfd_scale
if [[ ${1:-} == --module ]]; then module=$2; shift 2; fi
# A save at SIGTERM takes longer than torchrun's 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-300}"
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${RANKS:-gpu}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m "$module" "$@"
