"""Where results go: checked before the work, and written as a whole or not at all."""

import os
import shutil
from pathlib import Path

from .errors import CommandError

__all__ = ["check_readable", "check_writable", "make_folder", "write_whole"]


def check_readable(option: str, file: str | Path | None) -> None:
    """Raise `CommandError` unless a file that an option names is there."""
    if file is not None and not Path(file).is_file():
        raise CommandError(f"{option} {file} does not exist or is not a file")


def check_writable(file: str | Path | None, folder: str | Path | None = None) -> None:
    """Fail before the work, not after it, where a file or a folder of results cannot be written.

    The folder (the file's, too) may be new, its parent may not. Nothing is made yet: a run that is refused or
    interrupted leaves no empty file.

    Raises:
        CommandError: it cannot, and why.
    """
    if folder is not None:
        _check_folder(Path(folder), folder)
    if file is None:
        return
    path = Path(file)
    if not path.exists():
        _check_folder(path.parent, file)
    if path.is_dir():
        raise CommandError(f"cannot write to {file}: Is a directory")
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"cannot write to {file}: Permission denied")


def _check_folder(folder: Path, asked: str | Path) -> None:
    parent = folder if folder.exists() else folder.parent
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"cannot write to {asked}: {folder} is not a folder")
    if not parent.is_dir():
        raise CommandError(
            f"cannot write to {asked}: there is no folder {parent}; only the last folder of a path is made"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(f"cannot write to {asked}: Permission denied")


def make_folder(folder: str | Path) -> Path:
    """The folder, made if it does not exist; its parent must.

    Raises:
        CommandError: it cannot be made.
    """
    try:
        Path(folder).mkdir(exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from None
    return Path(folder)


def write_whole(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a file, all of it or nothing: until the content is on the disk, what was there before stays.

    The content is written beside its place, flushed to the disk and then moved there. Text is UTF-8. Where
    that cannot be, as to ``/dev/stdout``, it is written to its place at once. The folder is made.

    Raises:
        CommandError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    place = Path(path)
    if place.is_file() or not place.exists():
        place = Path(os.path.realpath(path))  # a link stays one; a pipe's real name cannot be opened
        make_folder(place.parent)
    try:
        if place.exists() and not (place.is_file() and os.access(place.parent, os.W_OK)):
            place.write_bytes(data)
            return
        _replace(place, data)
    except OSError as error:
        raise CommandError(f"cannot write to {path}: {error.strerror or error}") from None


def _replace(place: Path, data: bytes | memoryview) -> None:
    temporary = place.with_name(f".poolformer-kernels.{os.getpid()}.tmp")  # never longer than names may be
    with temporary.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if place.exists():
                shutil.copymode(place, temporary)
            temporary.replace(place)
        except BaseException:  # an interrupt, too
            temporary.unlink(missing_ok=True)
            raise
