"""Checks the recipe of a launch in a process of its own, so that an error is printed once and not by every rank.

The check takes about a second. The launcher waits for it only if it starts ranks on other hosts. On one host the ranks
start meanwhile. A rank that finds the recipe invalid then waits until the launcher kills it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping, Sequence
from functools import partial

from sfd_scale import config
from sfd_scale.launch.status import USER_ERROR_EXIT_CODE
from sfd_scale.runtime.environment import text, without_rank

logger = logging.getLogger(__name__)
# If set, a command loads its recipe and exits: code 0, or 2 and the error.
CHECK_ONLY = "SFD_CHECK_ONLY"
# If set for a rank, its launcher checks the recipe; the rank waits so long to be killed.
CHECKED, CHECK_WAIT_S = "SFD_CHECKED", 60.0
CHECK_LIMIT_S = 300.0  # of the check; it imports torch, perhaps from a slow file system
# The package of the evaluation: a wheel has no top-level package of this name.
EVAL = "eval" if config.CHECKOUT is not None else "sfd_scale.eval"
# The commands that support CHECK_ONLY, by module.
COMMANDS = {"sfd_scale": ("train", "encode", "convert", "fit"), EVAL: ("generate", "score")}


class RecipeCheck:
    """Starts the check of one command line.

    Args:
        environment: of the ranks; CHECKED is set in it.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: MutableMapping[str, str]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        # A file, not a pipe: a full pipe would block the check, as nobody reads it before the end.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (it is read after the block)
        if arguments[:1] and arguments[0] in COMMANDS.get(module, ()):
            alone = without_rank(environment)
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], env={**alone, CHECK_ONLY: "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._output,
                preexec_fn=partial(os.nice, 10),  # lower priority than the ranks
            )  # fmt: skip
            if text("HOSTFILE", environment) is None:
                environment[CHECKED] = "1"

    @property
    def failed(self) -> bool:
        """Whether the check has ended and found an error in the recipe. Other failures are left to the ranks."""
        return self._process is not None and self._process.poll() == USER_ERROR_EXIT_CODE

    def wait(self) -> bool:
        """Wait for the check to end; returns `failed`. A check that takes too long finds nothing: the ranks will."""
        if self._process is not None:
            try:
                self._process.wait(CHECK_LIMIT_S)
            except subprocess.TimeoutExpired:
                logger.warning("the check of the recipe did not end in %.0f s; the ranks start without", CHECK_LIMIT_S)
                self._process.kill()
        return self.failed

    def error(self) -> str:
        """The error message of a failed check."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def close(self) -> None:
        """Stop the check."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
