"""Entry point of the scripts in launchers/: `python -m sfd_scale.launch LAUNCHER [--module M] COMMAND RECIPE ...`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from sfd_scale import config
from sfd_scale.launch import status
from sfd_scale.launch.check import EVAL, RecipeCheck
from sfd_scale.launch.commands import LAUNCHERS, RankCommand, make_launch
from sfd_scale.launch.supervisor import Supervisor
from sfd_scale.runtime import environment as variables
from sfd_scale.runtime import output
from sfd_scale.runtime.errors import error_text, require_folder
from sfd_scale.runtime.signals import STOP_SIGNALS

logger = logging.getLogger(__name__)


def launch(launcher: str, module: str, arguments: Sequence[str]) -> int:
    """Start the ranks and wait for them; forward stop signals to them.

    Returns:
        The exit code: 0, 75 if the run saved and stopped on request, 2 for a user's error, else the launcher's.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [launch] %(levelname)s %(message)s", datefmt="%H:%M:%S")
    # Until ranks start, a stop signal exits. Process 1 of a container has no default handlers.
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda *_: sys.exit(status.REQUEUE_EXIT_CODE))
    environment = variables.snapshot()
    try:
        require_folder()
        variables.check(environment)
        arguments = config.checked_arguments(arguments)
    except ValueError as error:
        return _user_error(error)
    if arguments[:1] == ["eval"]:  # `sfd eval COMMAND`
        module, arguments = "eval", arguments[1:]
    if module == "eval":
        module = EVAL
    if config.CHECKOUT is not None:  # the ranks import the package `eval` from here
        paths = [variables.text("PYTHONPATH", environment), str(config.CHECKOUT)]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    check = RecipeCheck(module, arguments, environment)
    try:
        made = make_launch(launcher, RankCommand(module, tuple(arguments)), environment)
        if variables.text("HOSTFILE", environment) and check.wait():
            sys.stderr.write(check.error())
            return status.USER_ERROR_EXIT_CODE
        return Supervisor(made, check).run()
    except (ValueError, OSError) as error:
        return _user_error(error)
    finally:
        check.close()


def _user_error(error: Exception) -> int:
    sys.stderr.write(f"error: {error_text(error)}\n")
    return status.USER_ERROR_EXIT_CODE


def main() -> None:
    output.make_safe()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in LAUNCHERS:
        sys.stderr.write(f"error: {arguments[:1]}: no such launcher; allowed: {', '.join(LAUNCHERS)}\n")
        sys.exit(status.USER_ERROR_EXIT_CODE)
    launcher, rest = arguments[0], arguments[1:]
    module = "sfd_scale"
    if rest[:1] == ["--module"] and len(rest) > 1:
        module, rest = rest[1], rest[2:]
    sys.exit(launch(launcher, module, rest))


if __name__ == "__main__":
    main()
