"""Logging to standard error, with the rank in every line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfd_scale.runtime import environment

logger = logging.getLogger(__name__)
console = Console(stderr=True)


def setup_logging() -> None:
    """Set up logging to standard error; ranks other than 0 log only warnings and errors."""
    rank = environment.rank()
    prefix = f"[rank {rank}] " if environment.launched() else ""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path := environment.text("SFD_RANK_LOG"):  # set by launch/rank.py if the rank writes to a terminal
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    for noisy in ("DeepSpeed", "deepspeed", "streaming", "torch.distributed", "timm", "urllib3", "PIL", "wandb"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # huggingface_hub has its own handler. Without a network it warns at every retry; the final error is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False


def log_summary(title: str, facts: Mapping[str, Any]) -> None:
    """Show the facts of a run, on rank 0: a table on a terminal, otherwise one log line per fact."""
    from sfd_scale.runtime import distributed  # here: it imports torch

    if not distributed.is_main():
        return
    if not console.is_terminal:
        for name, value in facts.items():
            logger.info("%s: %s: %s", title, name, value)
        return
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(str(value)))
    console.print(table)
