"""The exception tree: everything a user can cause or meet, each a message of one line."""


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
