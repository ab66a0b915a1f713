"""Every error this package raises, as one tree.

LMCacheExtError
├── ConfigError              a setting that cannot be honoured; stops the start
├── ManifestError            a manifest that cannot be read, converted or applied
├── RequestRefused           a request to the controller that is answered with a status and a way out
├── StoreError               a store operation failed; judged by stores.guard alone
│   ├── StoreTimeout         the deadline passed
│   │   └── StoreStalled     the backend stopped in the middle of an answer, long before it
│   ├── StoreUnavailable     refused, vanished, read-only, I/O error
│   │   └── StoreRefused     it answered, and the answer is no
│   └── StoreFull            no room, and none could be made
└── FrameError               stored bytes that are not what they claim; always a miss
    ├── TruncatedFrame       fewer bytes than the frame says
    ├── OversizedFrame       more bytes than the frame says, or than the row holds
    ├── BadMagic             not a frame at all
    ├── UnsupportedVersion   a frame of a format we do not read
    ├── ForeignNamespace     a frame of another model, layout or chunking
    ├── ForeignKey           a good frame under another chunk's key (two files swapped)
    ├── UnknownSerde         a frame whose payload we cannot decode
    ├── LengthMismatch       raw length differs from the row's
    ├── BadPayload           a payload that contradicts itself: not what our encoder writes
    └── ChecksumMismatch     a flipped bit

A miss is a value (``None``, ``False``), never one of these.
"""

from __future__ import annotations


class LMCacheExtError(Exception):
    """Root of every error raised here on purpose."""


class ConfigError(LMCacheExtError):
    """A setting that cannot be honoured.

    The message is one line that names the key, its value, where it came from
    (file and line, or variable) and the way out.
    """


class ManifestError(LMCacheExtError):
    """A manifest that cannot be read, converted or applied; the message is one line with the place and the way out."""


class RequestRefused(LMCacheExtError):
    """A request over HTTP that is answered with `status` (of HTTP) and what to do instead; nothing has been done."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class StoreError(LMCacheExtError):
    """A store operation failed; the data, if any, is unharmed."""


class StoreTimeout(StoreError):
    """The operation did not finish within its deadline."""


class StoreStalled(StoreTimeout):
    """The backend stopped sending in the middle of what was asked for, or sends next to nothing."""


class StoreUnavailable(StoreError):
    """The backend refused, vanished, is read-only or answered with an I/O error."""


class StoreRefused(StoreUnavailable):
    """The other side understood, and said no; the message is its own."""


class StoreFull(StoreError):
    """The backend has no room and could not make any."""


class FrameError(LMCacheExtError):
    """Stored bytes that are not what they claim to be. Always treated as a miss."""


class TruncatedFrame(FrameError):
    """Fewer bytes than the frame says."""


class OversizedFrame(FrameError):
    """More bytes than the frame says, or than the row can hold."""


class BadMagic(FrameError):
    """Not a frame at all."""


class UnsupportedVersion(FrameError):
    """A frame of a format version this build does not read."""


class ForeignNamespace(FrameError):
    """A frame written for another model, layout or chunking."""


class ForeignKey(FrameError):
    """A well-formed frame found under the key of another chunk."""


class UnknownSerde(FrameError):
    """A frame whose payload encoding this reader does not have."""


class LengthMismatch(FrameError):
    """The raw length differs from the length of the row it should fill."""


class BadPayload(FrameError):
    """A serde's container that contradicts itself, or does not decode to what it says."""


class ChecksumMismatch(FrameError):
    """The stored bytes do not hash to the checksum in their frame."""
