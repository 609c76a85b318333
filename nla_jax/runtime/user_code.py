"""Functions that users name by import path: finding them, and saying which line of theirs went wrong."""

import contextlib
import dataclasses
import importlib
import inspect
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nla_jax.runtime.errors import InputError, first_line

PACKAGE = str(Path(__file__).parent.parent)


@dataclasses.dataclass(frozen=True)
class UserFunction:
    """A function (or class) that a setting names. Calling it raises `InputError` with file and line where it fails."""

    what: str  # the setting, such as rl.reward
    path: str  # package.module:name
    function: Callable
    source: str = ""  # checksums of the files behind it as they were when it was found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.blamed():
            return self.function(*args, **kwargs)

    def __str__(self) -> str:
        return f"{self.what} = {self.path} ({place(self.function)})"

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """What fails inside is reported as the function's fault; an `InputError` passes as it is."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
            at = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else place(self.function)
            raise InputError(
                f"{self.what} = {self.path} fails at {at}: {type(error).__name__}: {first_line(error)}."
            ) from error


def resolve(path: str, what: str) -> UserFunction:
    """The function at `package.module:name`, named by the setting `what`.

    Raises `InputError` where it cannot be imported or called."""
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise InputError(f"{what} is {path!r}, expected an import path such as package.module:function.")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise InputError(f"{what}: the module {module!r} imports {error.name!r}, which is not installed.") from None
        raise InputError(
            f"{what} names the module {module!r}, which cannot be found; install it, or run where {module}.py lies."
        ) from None
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
        at = f" at {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
        raise InputError(
            f"{what}: the module {module!r} cannot be imported: {type(error).__name__}{at}: {first_line(error)}."
        ) from error
    function, file = getattr(found, name, None), getattr(found, "__file__", None) or module  # built-in ones have none
    if function is None:
        raise InputError(f"{what} names {name!r}, but {file} has no such name.")
    if not callable(function):
        raise InputError(f"{what} names {name!r} of {file}, which is {type(function).__name__}, no function.")
    return UserFunction(what, path, function, "-".join(_checksums(file, function)))


def _checksums(file: str, function: Callable) -> Iterator[str]:
    """Of the file that an import path leads to, and of the one that defines the function, where there are such."""
    checksum = lambda path: f"{zlib.crc32(Path(path).read_bytes()):08x}"
    with contextlib.suppress(OSError):
        yield checksum(file)
    with contextlib.suppress(OSError, TypeError):
        yield checksum(inspect.getsourcefile(inspect.unwrap(getattr(function, "run", function))))


def place(function: Callable) -> str:
    """The file and line where a function is defined."""
    try:
        target = inspect.unwrap(function)
        return f"{inspect.getsourcefile(target)}, line {inspect.getsourcelines(target)[1]}"
    except (TypeError, OSError):
        return f"of {getattr(function, '__module__', None) or 'no module'}"


def _is_library(file: str) -> bool:
    """Whether a file belongs to this package, an installed one, or Python itself."""
    return (
        file.startswith((PACKAGE, "<"))
        or "site-packages" in file
        or file.startswith(str(Path(inspect.__file__).parent))
    )
