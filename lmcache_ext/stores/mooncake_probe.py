"""Joins a Mooncake store with no memory and leaves it: exit code 0 where that went well.

Run as a process of its own before the real client is set up, which holds the interpreter's lock for as long as a
master or metadata server is silent (4 s where it refuses, longer where it hangs): an engine would stand still.
"""

from __future__ import annotations

import os
import sys

from mooncake.store import MooncakeDistributedStore

_BUFFER_BYTES = 1024**2


def main(arguments: list[str]) -> int:
    """`arguments`: this host's name, metadata server, protocol, device, master."""
    host, metadata_server, protocol, device, master = arguments
    client = MooncakeDistributedStore()
    if client.setup(host, metadata_server, 0, _BUFFER_BYTES, protocol, device, master) != 0:
        return 1
    if metadata_server != "P2PHANDSHAKE":
        client.close()  # a metadata server remembers it; leaving takes a second
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # not through the client's own end, which waits for its heartbeat
