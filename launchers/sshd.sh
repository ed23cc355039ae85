#!/usr/bin/env bash
# An sshd of the own user on port SSH_PORT (2222), for containers that take part in a hostfile launch. Keys only.
# Put the launching user's public key into ~/.ssh/authorized_keys; the launching side says the port in its ssh_config.
set -euo pipefail
folder="${SSHD_FOLDER:-$HOME/.sshd}"
mkdir -p "$folder"
[[ -f $folder/host_key ]] || ssh-keygen -q -t ed25519 -N "" -f "$folder/host_key"
exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f /dev/null -p "${SSH_PORT:-2222}" -h "$folder/host_key" \
  -o PidFile="$folder/pid" -o PasswordAuthentication=no -o UsePAM=no -o StrictModes=no
