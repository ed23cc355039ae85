"""Folders that can be written, for what libraries build and cache.

An installation, and the home folder of a container's user, may be read-only or missing. Libraries then fail in the
middle of a run, or write to a folder that is called `~`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pwd
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

from sfd_scale.runtime import environment

logger = logging.getLogger(__name__)
# Folders of weights that were downloaded before are still read where the home folder cannot be written.
_DOWNLOADS = {"HF_HOME": ".cache/huggingface", "TORCH_HOME": ".cache/torch"}
# Triton keeps its own folder; all other libraries follow the XDG variables.
_CACHES = {
    "XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "XDG_DATA_HOME": ".local/share", "TRITON_HOME": "",
}  # fmt: skip


def writable(folder: Path) -> bool:
    """Whether this process can write below the folder, which may not exist yet."""
    there = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), Path("/"))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def use_writable_caches() -> None:
    """Set the variables of caches to a folder for temporary files, if the home folder is missing or cannot be written.

    A variable that is set stays. Every command calls this before it imports such libraries.

    Raises:
        ValueError: if no folder for temporary files can be written; says which variable to set.
    """
    home = _home()
    if home is not None and writable(home / ".cache"):
        return
    spare = spare_folder()
    for name, below in _DOWNLOADS.items():
        if home is not None and (home / below).is_dir():
            environment.set_default(name, str(home / below))
    if home is None:
        environment.set_default("HOME", str(spare))
    changed = [name for name in _CACHES if environment.text(name) is None]
    for name in changed:
        environment.set_default(name, str(spare / _CACHES[name]))
    if changed:
        logger.info(
            "HOME: %s; caches go to %s; to keep them set XDG_CACHE_HOME to a folder that can be written",
            "not set" if home is None else f"{home} cannot be written", spare,
        )  # fmt: skip


def _home() -> Path | None:
    """The home folder by HOME, or by the system's list of users, which lacks the users of many containers."""
    given = environment.text("HOME")
    if given is not None:
        return Path(given)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def spare_folder() -> Path:
    """A folder of this user below the folder for temporary files.

    Raises:
        ValueError: if there is no such folder, or another user has made it.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"sfd-scale-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ValueError("TMPDIR: no folder for temporary files can be written; set TMPDIR to one") from error
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return folder


def extensions_folder() -> Path:
    """The folder of compiled extensions: TORCH_EXTENSIONS_DIR, or the installation's, or a copy of that in a cache.

    torch locks and rewrites files in it even if nothing has to be compiled.

    Raises:
        ValueError: if TORCH_EXTENSIONS_DIR cannot be written.
    """
    given = environment.text("TORCH_EXTENSIONS_DIR")
    if given is not None:
        if not writable(Path(given)):
            raise ValueError(
                f"TORCH_EXTENSIONS_DIR: {given} cannot be written; allowed: a folder for compiled extensions that this "
                "user may write"
            )
        return Path(given)
    installed = Path(sys.prefix) / "torch_extensions"
    if writable(installed):
        return installed
    name = f"torch_extensions-{hashlib.sha256(str(installed).encode()).hexdigest()[:12]}"
    cache = Path(environment.text("XDG_CACHE_HOME") or (_home() or Path("/nonexistent")) / ".cache")
    copy = (cache / "sfd-scale" if writable(cache) else spare_folder()) / name
    if not copy.exists():
        logger.info("%s cannot be written; compiled extensions go to %s (TORCH_EXTENSIONS_DIR)", installed, copy)
        _copy(installed, copy)
    return copy


def _copy(source: Path, target: Path) -> None:
    """Copy a folder with its times, which tell ninja that nothing has to be compiled; or make an empty one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    if source.is_dir():
        shutil.copytree(source, unfinished)
    else:
        unfinished.mkdir()
    try:
        unfinished.rename(target)
    except OSError:  # another rank was faster
        shutil.rmtree(unfinished, ignore_errors=True)
