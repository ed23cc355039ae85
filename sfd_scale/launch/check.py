"""Whether the recipe of a launch is valid, asked of the command itself, in a process beside the launcher's start.

The settings stand beside the classes that they set, so that reading them loads torch: seconds that a start cannot
spare. So the launcher waits for the answer only where other hosts are to start ranks. On one host ranks begin
meanwhile; one that finds its recipe invalid waits to be ended, so that the mistake is told once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping, Sequence
from functools import partial

from sfd_scale.launch.status import USER_ERROR_EXIT_CODE

# A command that finds it in its environment ends with code 0 once it has its recipe, or says what is wrong with it.
CHECK_ONLY = "SFD_CHECK_ONLY"
# A rank that finds it in its environment has a launcher that will know of the mistake, within so many seconds.
CHECKED, CHECK_WAIT_S = "SFD_CHECKED", 60.0
# Those that know it.
COMMANDS = {"sfd_scale": ("train", "encode", "convert", "fit"), "eval": ("generate", "score")}
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class RecipeCheck:
    """The check of one command line, which has begun.

    Args:
        environment: of this process and of the ranks, which are told of it there.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: MutableMapping[str, str]) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        # A file: nobody reads it before the end, and a pipe that is full would hold the check up.
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 (it is read after the block)
        if arguments[:1] and arguments[0] in COMMANDS.get(module, ()):
            alone = {name: value for name, value in environment.items() if name not in _LAUNCHER}
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], env={**alone, CHECK_ONLY: "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._told,
                preexec_fn=partial(os.nice, 10),  # the ranks go first
            )  # fmt: skip
            if not environment.get("HOSTFILE"):
                environment[CHECKED] = "1"

    @property
    def refused(self) -> bool:
        """Whether it has ended, and found a mistake. Anything else that it ends with the ranks will meet, and say."""
        return self._process is not None and self._process.poll() == USER_ERROR_EXIT_CODE

    def wait(self) -> bool:
        """Wait for it to end; returns `refused`."""
        if self._process is not None:
            self._process.wait()
        return self.refused

    def sentence(self) -> str:
        """What is wrong with the recipe, once it is refused."""
        self._told.seek(0)
        return self._told.read().decode(errors="replace")

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
