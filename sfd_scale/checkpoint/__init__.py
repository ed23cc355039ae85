"""Checkpoints that any engine at any world size can read: save, load, prune, export, post-hoc EMA."""

from sfd_scale.checkpoint.folder import Checkpoint, whole_checkpoints
from sfd_scale.checkpoint.manager import CheckpointConfig, CheckpointManager, power_averages
from sfd_scale.checkpoint.metadata import CheckpointError
from sfd_scale.checkpoint.posthoc import reconstruct
from sfd_scale.checkpoint.weights import WEIGHTS, export_weights, load_weights, load_whole, save_weights, start_weights

__all__ = [
    "WEIGHTS",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointManager",
    "export_weights",
    "load_weights",
    "load_whole",
    "power_averages",
    "reconstruct",
    "save_weights",
    "start_weights",
    "whole_checkpoints",
]
