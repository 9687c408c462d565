"""Writing files whole or not at all; where results are cached, and when what lies there is believed."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Optional, TypeVar, Union

from .errors import ConfigError, MMTSError, cause

if TYPE_CHECKING:
    import numpy as np

try:
    import fcntl
except ImportError:  # Windows: no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]
T = TypeVar("T")

_HOST = hashlib.blake2b(platform.node().encode(errors="replace"), digest_size=4).hexdigest()
_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-[a-z0-9_]{8}\.tmp")
_FOREIGN_AGE = 24 * 3600  # seconds until what another machine left is taken for left
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither a link nor a pipe that nobody writes to
_told: set[str] = set()
_swept: set[str] = set()


@contextmanager
def writing(path: object, what: str, kind: type[MMTSError] = MMTSError) -> Iterator[None]:
    """Around everything that writes: a full disk, a read-only folder or a name too long becomes one error.

    Args:
        path: the file for the message.
        what: what could not be done, such as ``"cannot write the report"``.
        kind: the error to raise.

    Raises:
        MMTSError: of ``kind``.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:
        raise kind(f"{path}: {what}: {cause(error)}") from error


def check_writable(output: PathLike) -> None:
    """Before long work whose result goes to ``-o/--output``: the nearest folder above it that exists can be written.

    Raises:
        ConfigError: it cannot.
    """
    above = Path(output).absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{output}: cannot be written, {above} is not a writable folder (-o/--output)")


# --- whole or not at all


@contextmanager
def replacing(path: PathLike, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends well, remove it when it does not.

    What killed runs left beside it in this way is removed.

    Args:
        path: the file.
        private: a file of the cache: nobody else may read it, and whatever stands there goes, be it a folder;
            otherwise the umask decides, as for any other file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(target, False) as temporary:
        yield temporary
        if not private:
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp gives 0600
        elif target.is_dir():
            remove(target)
        os.replace(temporary, target)


@contextmanager
def replacing_folder(path: PathLike) -> Iterator[Path]:
    """:func:`replacing` for a folder, which only this user may open; what stood at ``path`` goes."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(target, True) as temporary:
        yield temporary
        remove(target)
        os.replace(temporary, target)


@contextmanager
def _temporary(target: Path, folder: bool) -> Iterator[Path]:
    """An empty file or folder beside ``target``. A lock held on it tells that somebody still works there."""
    _sweep(target.parent)
    prefix = f".{os.fsdecode(os.fsencode(target.name)[:100])}.{_HOST}-"
    while True:
        if folder:
            name = tempfile.mkdtemp(".tmp", prefix, target.parent)
            handle = None if fcntl is None else os.open(name, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(".tmp", prefix, target.parent)
        if handle is None or (_lock(handle, wait=False) is not False and os.path.lexists(name)):
            break
        os.close(handle)  # somebody swept it before it was locked
    if fcntl is None and handle is not None:
        os.close(handle)  # Windows moves no open file
        handle = None
    try:
        yield Path(name)
    finally:
        remove(Path(name))
        if handle is not None:
            os.close(handle)


def _lock(handle: int, wait: bool) -> Optional[bool]:
    """Whether the lock is ours; ``None`` where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (AttributeError, OSError):  # Windows; a network file system without locks
        return None
    return True


def _sweep(folder: Path) -> None:
    """Remove temporaries that nobody holds any more; once for each folder and process."""
    if str(folder) in _swept or fcntl is None:
        return
    _swept.add(str(folder))
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None:
                continue
            with suppress(OSError):
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if found[1] != _HOST and age < _FOREIGN_AGE:
                    continue  # locks may not be seen across machines
                handle = os.open(entry.path, os.O_RDONLY | _SAFE)
                try:
                    if _lock(handle, wait=False):
                        remove(Path(entry.path))
                finally:
                    os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a whole folder, if it is there."""
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):  # what unlinking a folder gives on Linux, elsewhere
        shutil.rmtree(path, ignore_errors=True)


# --- the cache


def cache_folder(*below: str) -> Optional[Path]:
    """A folder of the cache, made where it is not there. The cache is ``$MMTS_CACHE``, else ``~/.cache/mmts-plugins``.

    Args:
        below: names of the folders under it, outermost first.

    Returns:
        The folder. ``None``: nothing is to be cached (``MMTS_CACHE=""``), or the folder cannot be made, or somebody
        else may write to it, of which a warning tells once.
    """
    chosen = os.environ.get("MMTS_CACHE")
    if chosen == "":
        return None
    folder = Path("~/.cache/mmts-plugins")
    try:
        if chosen is not None:
            folder = Path(chosen)
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmts-plugins"
        folder.parent.mkdir(parents=True, exist_ok=True)
        for name in ("", *below):
            folder = folder / name
            with suppress(FileExistsError):
                folder.mkdir(0o700)
            _require_own(folder.lstat(), "it")
            _require_own(folder.stat(), "it")
            if not folder.is_dir():
                raise NotADirectoryError("not a folder")
    except (OSError, RuntimeError, ValueError) as error:  # no home; a name that no file can have
        _tell(
            str(folder), "%s cannot serve as a cache (%s); what would be kept there is made anew", folder, cause(error)
        )
        return None
    return folder


def _tell(once: str, message: str, *args: object) -> None:
    """Warn; of all warnings with the same word only the first, unless the word is empty."""
    if once not in _told:
        logger.warning("MM-TS: " + message, *args)
    if once:
        _told.add(once)


def _require_own(status: os.stat_result, what: str) -> None:
    """Raise a PermissionError for what others own or may write to."""
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{what} belongs to another user")
    if not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{what} can be written to by others; chmod go-w it")


class Sealed:
    """A file being written whose digest will follow its content; what :func:`np.save` takes for a file."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self._file, self._digest = file, _seal(label)

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def finish(self) -> None:
        self._file.write(_trailer(self._digest))


def _seal(label: str) -> Any:
    return hashlib.blake2b(label.encode() + b"\0", digest_size=16, person=b"mmts cache 1")


def _trailer(digest: Any) -> bytes:
    return b"\n" + digest.hexdigest().encode() + b"\n"


_TRAILER = len(_trailer(_seal("")))


@contextmanager
def sealing(path: Path, label: str) -> Iterator[Sealed]:
    """Write a file that :func:`cached` will believe under the same label (what it is the result of)."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        sealed = Sealed(file, label)
        yield sealed
        sealed.finish()


def keep(path: Optional[Path], label: str, write: Callable[[Sealed], object]) -> None:
    """Seal what ``write`` writes at ``path``, for :func:`cached` to find; where that cannot be, a warning tells."""
    if path is None:
        return
    try:
        with replacing(path, private=True) as temporary, sealing(temporary, label) as file:
            write(file)
    except OSError as error:
        logger.warning("MM-TS: %s cannot be cached (%s); it is made anew next time", path, cause(error))


def cached(
    path: Optional[Path],
    label: str,
    read: Callable[[BinaryIO, int], T],
    instead: str = "building it again",
    once: str = "",
) -> Optional[T]:
    """What was made of a sealed file, if it is there and is what this user sealed under this label.

    Args:
        path: the file; ``None``: there is no cache.
        label: as given to :func:`sealing`.
        read: the open file and how many bytes of it are content, to the result. May raise anything.
        instead: what is done where it cannot be used, for the warning.
        once: of all files with this word only the first that is odd is told of.

    Returns:
        ``None`` where the file is not there; or is a link, another's, damaged or of another release, or ``read``
        raised: with a warning, and the caller builds it anew.
    """
    if path is None:
        return None
    try:
        with open(os.open(path, os.O_RDONLY | _SAFE), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a file")
            _require_own(status, "it")
            size = status.st_size - _TRAILER
            if size < 0:
                raise ValueError("it is cut off")
            digest, left, block = _seal(label), size, memoryview(bytearray(1 << 20))
            while left:
                many = file.readinto(block[: min(left, len(block))])
                if not many:
                    raise ValueError("it is cut off")
                digest.update(block[:many])
                left -= many
            if file.read() != _trailer(digest):
                raise ValueError("its digest does not match: it was damaged, changed, or written by another release")
            file.seek(0)
            return read(file, size)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it can be built again
        _tell(once, "%s cannot be used (%s); %s", path, cause(error), instead)
        return None


def mapped(file: BinaryIO, size: int, dtype: str, dimensions: int) -> np.ndarray:
    """The array of a sealed ``.npy`` file, mapped for reading.

    Raises:
        ValueError: it is of another type or shape.
    """
    import numpy as np  # not at the start of every command

    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy")
    shape, fortran, found = np.lib.format.read_array_header_1_0(file)
    offset = file.tell()
    if found != np.dtype(dtype) or fortran or len(shape) != dimensions or 0 in shape:
        raise ValueError(f"it holds {found} of shape {shape}")
    if offset + int(np.prod(shape, dtype=np.int64)) * found.itemsize != size:
        raise ValueError("its header does not fit its length")
    return np.memmap(file, dtype, "r", offset, shape)


@contextmanager
def one_at_a_time(path: Optional[Path]) -> Iterator[None]:
    """Processes that would build the same file do it one after another; the lock goes with its owner.

    Without locks, or a cache (``None``), each builds its own.
    """
    handle = None if path is None or fcntl is None else _held(Path(f"{path}.lock"))
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _held(path: Path) -> Optional[int]:
    handle = None
    try:
        # Never truncated, never through a link: what lies there may be somebody's file.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _SAFE, 0o600)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("not a file")
        _require_own(os.fstat(handle), "it")
    except OSError as error:
        logger.warning("MM-TS: %s cannot be locked (%s); going on without", path, cause(error))
        if handle is not None:
            os.close(handle)
        return None
    if _lock(handle, wait=False) is False:
        logger.info("MM-TS: waiting for another process that is building %s", path.with_suffix(""))
        _lock(handle, wait=True)
    return handle
