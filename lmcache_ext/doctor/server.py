"""What a running server says, as facts: asked here over HTTP, judged in `condition` and `peers`.

It is what every server shows (/metrics), what the model server of this project shows to who may ask
(/lmcache/v1/config), and for one request /lmcache/v1/explain.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmcache_ext.exposition import Sample, read_samples

TIMEOUT_S = 60.0
CONFIG, EXPLAIN = "/lmcache/v1/config", "/lmcache/v1/explain"


@dataclass(slots=True)
class Facts:
    """What one server said."""

    url: str
    config_status: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[Sample]] = field(default_factory=dict)
    explain_status: int = 0
    explanation: dict[str, Any] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of a metric's samples with these labels; None where there are none."""
        found = [value for has, value in self.metrics.get(name, ()) if labels.items() <= has.items()]
        return sum(found) if found else None

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Samples above zero, summed by some labels."""
        found: dict[tuple[str, ...], float] = {}
        for has, value in self.metrics.get(name, ()):
            if value > 0:
                key = tuple(has.get(label, "") for label in labels)
                found[key] = found.get(key, 0.0) + value
        return found

    @property
    def namespace(self) -> str:
        """As 32 hexadecimal digits; empty where the server did not explain it."""
        found = self.explanation.get("namespace")
        return found if isinstance(found, str) else ""

    def setting(self, key: str) -> str | None:
        """A setting's effective value, as text; None where the server did not say."""
        found = self.config.get("settings", {}).get(key)
        return None if found is None else str(found["value"])


def gather(url: str, *, api_key: str | None = None, request: Mapping[str, Any] | None = None) -> Facts:
    """Ask one server. Raises OSError where it cannot be reached, ValueError where `url` is not one of http."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is not a server's address: write it as http://host:8080")
    facts = Facts(url.rstrip("/"))
    status, text = _fetch(facts.url + "/metrics", api_key)
    facts.metrics = read_samples(text) if status == 200 else {}
    facts.config_status, text = _fetch(facts.url + CONFIG, api_key)
    facts.config = _json(text)
    if request is not None:
        facts.explain_status, text = _fetch(facts.url + EXPLAIN, api_key, request)
        facts.explanation = _json(text)
    return facts


def _fetch(url: str, api_key: str | None, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Status and text of an answer, whatever it is. Raises OSError where there is none."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    data = None
    if body is not None:
        data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    call = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(call, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")
    except http.client.HTTPException as error:  # it has answered, and not in HTTP
        raise ConnectionError(f"{url} is no HTTP server: {error!r}") from error


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
