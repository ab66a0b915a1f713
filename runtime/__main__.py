"""`python -m runtime --model_name=llama3 --model_id=... [any flag of vLLM]`."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> int:
    """Parse, configure logging, run. Exit codes: 0 drained, 1 engine failed, 2 bad arguments or configuration."""
    # As pid 1 of a container a process without a handler cannot be ended by SIGTERM at all.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    argv = sys.argv[1:]
    del sys.argv[1:]  # kserve.model_server parses sys.argv when imported, and takes vLLM's flags for abbreviations

    from runtime.args import parse, set_engine_environment
    from runtime.argv import UsageError

    try:
        settings = parse(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_engine_environment(settings)

    from runtime.logs import configure
    from runtime.server import serve

    configure(settings)
    return serve(settings)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
