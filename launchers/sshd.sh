#!/usr/bin/env bash
# Starts sshd as the current user on port SSH_PORT (default 2222), for containers in a hostfile launch. Keys only.
# Put the launching user's public key into ~/.ssh/authorized_keys. Set the port in the ssh_config of the launching host.
set -euo pipefail
folder="${SSHD_FOLDER:-$HOME/.sshd}"
mkdir -p "$folder"
[[ -f $folder/host_key ]] || ssh-keygen -q -t ed25519 -N "" -f "$folder/host_key"
exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f /dev/null -p "${SSH_PORT:-2222}" -h "$folder/host_key" \
  -o PidFile="$folder/pid" -o PasswordAuthentication=no -o UsePAM=no -o StrictModes=no
