"""Which source a result is of; imports nothing, so that it can be asked where torch is broken."""

import os
import subprocess
from pathlib import Path

__all__ = ["commit_of"]


def commit_of(folder: Path) -> str:
    """POOLFORMER_KERNELS_COMMIT where it is set, else the commit of the folder's tree, else "unknown"."""
    if given := os.environ.get("POOLFORMER_KERNELS_COMMIT"):
        return given
    git = ["git", "-C", str(folder)]
    options = {"capture_output": True, "text": True, "check": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **options)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **options)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
