#!/usr/bin/env bash
# DeepSpeed's launcher, on this host (RANKS=n) or on the hosts of a hostfile (HOSTFILE=hosts).
#   launchers/deepspeed.sh train RECIPE [key=value ...]
#   launchers/deepspeed.sh --module eval generate RECIPE [...]
# Environment: RANKS, HOSTFILE, LAUNCHER (pdsh, openmpi, slurm), LAUNCHER_ARGS, NO_SSH with NODE_RANK, MASTER_ADDR,
# MASTER_PORT, EXPORT (names of variables to export), SHUTDOWN_TIMEOUT (seconds for a save), LOG_FOLDER.
# See docs/multinode.md.
exec python -m sfd_scale.launch deepspeed "$@"
