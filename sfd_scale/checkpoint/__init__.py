"""Checkpoints that any engine at any world size can read: save, load, latest, prune, export."""

from sfd_scale.checkpoint.folder import CheckpointError, checkpoint_hash, committed, read_state
from sfd_scale.checkpoint.manager import CheckpointConfig, CheckpointManager, power_averages
from sfd_scale.checkpoint.posthoc import reconstruct
from sfd_scale.checkpoint.weights import export_weights, load_weights, save_weights, start_weights

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointManager",
    "checkpoint_hash",
    "committed",
    "export_weights",
    "load_weights",
    "power_averages",
    "read_state",
    "reconstruct",
    "save_weights",
    "start_weights",
]
