"""Binary keys as names that LMCache's own server accepts.

That server takes a key apart at every ``@`` and dies of one with fewer than five parts, so a key
travels to it as the chunk hash of a model that does not exist. Our server keeps all objects under
these names, whichever protocol brought them.
"""

from __future__ import annotations

import hashlib

MAX_PLAIN_BYTES = 67
"""More hexadecimal digits than these make would not fit the 150 characters of a name."""


def name_of(key: bytes) -> str:
    """The name of a key; of a long one its SHA-256. Distinct keys have distinct names."""
    if len(key) <= MAX_PLAIN_BYTES:
        return f"kvcf@1@0@{key.hex()}@uint8"
    return f"kvch@1@0@{hashlib.sha256(key).hexdigest()}@uint8"


def key_of(name: str) -> bytes | None:
    """The key of a name; None where it is that of a long key, or of somebody else's."""
    pieces = name.split("@")
    try:
        return bytes.fromhex(pieces[3]) if len(pieces) == 5 and pieces[0] == "kvcf" else None
    except ValueError:
        return None
