"""``lmcache-ext doctor URL``: why there are no hits, asked of running servers, their peers and their backends.

Facts are gathered first and judged then: `server` asks a server and `condition` judges it, `peers` compares servers,
`backends` asks and judges what is behind `remote_url`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lmcache_ext.config import Config, load_config
from lmcache_ext.config_urls import mask_url
from lmcache_ext.doctor import backends, condition, peers, server
from lmcache_ext.doctor.findings import Finding
from lmcache_ext.errors import ConfigError
from lmcache_ext.stores.base import Survey
from lmcache_ext.stores.options import store_options

OK, FOUND, REFUSED = 0, 1, 2
ANY_PROMPT = {"prompt": "a"}  # every explanation says what its server's namespace is made of

Told = tuple[str, Finding]  # whom it is about, where that is not said in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the verb."""
    parser.add_argument("urls", nargs="+", metavar="URL", help="a model server, such as http://localhost:8080")
    parser.add_argument("--prompt", metavar="TEXT", help="explain this prompt too")
    parser.add_argument("--request", metavar="FILE", help="explain the request with this JSON body too")
    parser.add_argument("--api-key-file", metavar="FILE", help="the servers' API key")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="URL", help="compare with this server, as with every further URL"
    )
    parser.add_argument(
        "--backend", action="append", default=[], metavar="URL", help="ask this backend too, written as in remote_url"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the servers' LMCache file: its remote_url, and passwords and TLS of backends"
    )
    parser.add_argument("--namespace", default="", metavar="HEX", help="the servers', where they do not explain")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what keeps each server from hits; 1 if something does, 2 if the first of them cannot be asked."""
    try:
        found = list(_diagnose(arguments))
    except (OSError, ValueError, ConfigError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    for about, finding in found:
        print(f"{about + ': ' if about else ''}{finding.level}: {finding.what}")
        if finding.way_out:
            print(f"    {finding.way_out}")
    return FOUND if any(finding.level == "problem" for _, finding in found) else OK


def _diagnose(arguments: argparse.Namespace) -> Iterator[Told]:
    config = load_config(path=arguments.config, environ={})
    urls = list(dict.fromkeys([*arguments.backend, *([config.live.remote_url] if config.live.remote_url else [])]))
    key = Path(arguments.api_key_file).read_text().strip() if arguments.api_key_file else None
    request = _request(arguments)
    servers = [*arguments.urls, *arguments.peer]
    compares = len(servers) > 1 or bool(urls)
    asks = partial(server.gather, api_key=key, request=request or (ANY_PROMPT if compares else None))
    try:
        asked = [asks(servers[0])]
    except OSError as error:
        raise ConnectionError(f"{servers[0]} does not answer: {error}") from error
    for url in servers[1:]:
        try:
            asked.append(asks(url))
        except OSError as error:
            yield "", Finding("problem", f"{url} does not answer: {error}", "is it up, and is this its address?")
    surveys = [survey for url in urls for survey in backends.gather(url, store_options(url, config))]
    for facts in asked:
        about = facts.url if len(servers) > 1 else ""
        yield from ((about, finding) for finding in condition.findings(facts, request is not None))
    for other in asked[1:]:
        yield from (("", finding) for finding in peers.differences(asked[0], other))
    if urls:
        yield from _of_backends(surveys, arguments.namespace or asked[0].namespace, config)
    else:
        yield from (("", finding) for facts in asked for finding in _not_asked(facts))


def _of_backends(surveys: list[Survey], namespace: str, config: Config) -> Iterator[Told]:
    timeout_s = config.live.lookup_timeout_ms / 1000
    for survey in surveys:
        for finding in backends.findings(survey, namespace=namespace, lookup_timeout_s=timeout_s):
            yield "", finding


def _not_asked(facts: server.Facts) -> Iterator[Finding]:
    url = facts.setting("remote_url")
    if url not in (None, "none"):
        yield Finding("note", f"its remote_url, {mask_url(url)}, was not asked", "--backend URL, or --config FILE")


def _request(arguments: argparse.Namespace) -> dict[str, object] | None:
    """The request to explain; ValueError for a file that holds none."""
    if arguments.prompt is not None:
        return {"prompt": arguments.prompt}
    if arguments.request is None:
        return None
    body = json.loads(Path(arguments.request).read_text())
    if not isinstance(body, dict):
        raise ValueError(f"{arguments.request}: is not the JSON body of a completion")
    return body
