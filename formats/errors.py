"""The exception tree: everything a user can cause or meet, each a message of one line."""

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class StreamingExpertsError(Exception):
    """Base of all errors that a command shows as one line and ends with exit status 1."""


class FormatError(StreamingExpertsError):
    """Bytes or JSON from outside are not what they should be: names file, field, found and expected."""


class ChecksumError(FormatError):
    """Bytes do not have the checksum that the index states for them."""


class UnsupportedError(StreamingExpertsError):
    """A valid input asks for something that this version does not implement."""


class RequestError(StreamingExpertsError):
    """A request that cannot be met: too little memory or disk, too long a prompt, a bad option value."""


class StorageError(StreamingExpertsError):
    """The operating system refused: a full disk, a read-only folder, a short read."""


def os_error_line(error: OSError) -> str | None:
    """What a command says of an OSError that reached it: the file and the reason, or that stdout cannot be written.

    None for any other error without a file, which is a bug of ours and keeps its traceback.
    """
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"the output cannot be written ({error.strerror})" if error.errno in _FULL else None
