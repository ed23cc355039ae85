#!/usr/bin/env bash
# Multi-node (HOSTFILE=hosts) or one-node (RANKS=n) start through the deepspeed launcher:
#   launchers/deepspeed.sh train RECIPE [key=value ...]
#   launchers/deepspeed.sh --module eval generate RECIPE [...]
# Environment: HOSTFILE, RANKS, LAUNCHER (pdsh, openmpi, slurm), MASTER_ADDR, MASTER_PORT.
set -euo pipefail
module=sfd_scale
if [[ ${1:-} == --module ]]; then module=$2; shift 2; fi
args=(--no_local_rank)
if [[ -n ${HOSTFILE:-} ]]; then
  args+=(--hostfile "$HOSTFILE" --launcher "${LAUNCHER:-pdsh}")
  [[ -n ${MASTER_ADDR:-} ]] && args+=(--master_addr "$MASTER_ADDR")
elif [[ ${DS_ACCELERATOR:-} == cpu ]]; then
  args+=(--num_accelerators "${RANKS:-1}")
elif [[ -n ${RANKS:-} ]]; then
  args+=(--num_gpus "$RANKS")
fi
args+=(--master_port "${MASTER_PORT:-$((20000 + RANDOM % 20000))}")
exec deepspeed "${args[@]}" --module "$module" "$@"
