"""A model server that answers as told: recorded shapes of /metrics and /lmcache/v1/, over real HTTP."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lmcache_ext.doctor.server import CONFIG, EXPLAIN

LABELS = 'engine="0",model_name="tiny"'
HEALTHY = f"""\
# HELP lmcache_ext:cache_active 1 while the KV cache connector is on.
# TYPE lmcache_ext:cache_active gauge
lmcache_ext:cache_active{{{LABELS}}} 1.0
lmcache:num_lookup_requests_total{{{LABELS}}} 4.0
lmcache:num_requested_tokens_total{{{LABELS}}} 4000.0
lmcache:num_hit_tokens_total{{{LABELS},tier="host"}} 1024.0
lmcache:num_hit_tokens_total{{{LABELS},tier="disk"}} 512.0
lmcache_ext:tier_up{{{LABELS},tier="disk"}} 1.0
vllm:cache_config_info{{block_size="128",enable_prefix_caching="True",prefix_caching_hash_algo="sha256_cbor"}} 1.0
"""
SETTINGS = {
    "chunk_size": {"value": "256", "origin": "/lmcache/c.yaml:1", "live": False},
    "bypass": {"value": "false", "origin": "default", "live": True},
    "freeze": {"value": "false", "origin": "default", "live": True},
}
SHOWN = {"digest": "aaaaaaaa", "in_effect": True, "last_refusal": None, "settings": SETTINGS, "engines": {}}
TOLD = {
    "namespace": "00ff",
    "components": {"weights": "w1", "hash": "h"},
    "reason": "differs",
    "text": "tokens up to 64 are known",
    "first_missing_token": 64,
    "text_before": "once upon",
    "text_after": " a time",
}


class Answers:
    """A server that answers as told: path -> (status, text)."""

    def __init__(self, metrics=HEALTHY, config=SHOWN, explanation=TOLD, key=None):
        self.key = key
        self.requests = []
        self.answers = {
            "/metrics": (200, metrics),
            CONFIG: (200, json.dumps(config)),
            EXPLAIN: (200, json.dumps(explanation)),
        }
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def do_POST(self):
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, handler):
        status, text = self.answers.get(handler.path, (404, "{}"))
        if self.key and handler.path != "/metrics" and handler.headers["Authorization"] != f"Bearer {self.key}":
            status, text = 401, '{"error": "Unauthorized"}'
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(text.encode())

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def answering():
    """What starts such servers; they end with it."""
    made = []

    def start(**options):
        made.append(Answers(**options))
        return made[-1]

    yield start
    for server in made:
        server.close()


@contextmanager
def saying(banner: bytes):
    """The http:// URL of a server that speaks something else: it says this to its first caller, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        speaker = threading.Thread(target=_say_once, args=(listener, banner), daemon=True)
        speaker.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        speaker.join(10.0)


def _say_once(listener, banner):
    sock, _ = listener.accept()
    with sock:
        sock.recv(65536)
        sock.sendall(banner)
