"""What a container of one of our images starts with, read from the Dockerfile."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCKERFILE = Path(__file__).resolve().parents[2] / "Dockerfile"


@dataclass(frozen=True)
class Image:
    """The configuration of an image: environment and user."""

    env: dict[str, str]
    uid: int
    gid: int


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest of it) in order, continuation lines joined and comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.strip().partition(" ")[::2] for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, rest in pairs]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name of a stage -> (what it is built from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for name, rest in instructions(DOCKERFILE.read_text()):
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = (base, current := [])
        else:
            current.append((name, rest))
    return found


def image(target: str) -> Image:
    """The configuration that the stages up to `target` amount to."""
    base, own = stages()[target]
    inherited = image(base) if base in stages() else Image({}, 0, 0)
    env, uid, gid = dict(inherited.env), inherited.uid, inherited.gid
    for name, rest in own:
        if name == "ENV":
            env |= dict(re.findall(r"(\w+)=(\S+)", rest))
        elif name == "USER":
            uid, gid = map(int, rest.split(":"))
    return Image(env, uid, gid)
