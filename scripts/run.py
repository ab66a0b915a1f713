"""Serves a model on this machine's CPU, with a KV cache in host memory and on disk.

Run it as ``make run [MODEL=/path|hub/id] [PORT=8080] [ARGS='...']``. Without a model it
makes a tiny random one. Everything it writes goes to `.cache/`; the cache is configured
by `.cache/lmcache_config.yaml`, written once and yours to edit.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
CONFIG = CACHE / "lmcache_config.yaml"

POLL_S = 2
KV_TRANSFER = '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'

CONFIG_TEXT = """\
chunk_size: 256           # tokens per stored chunk
local_cpu: true
max_local_cpu_size: 1.0   # GB of host memory
local_disk: "file://{disk}"
max_local_disk_size: 4.0  # GB of disk
"""

READY_TEXT = """
The server is ready. Try it, twice:

  curl -s http://localhost:{port}/openai/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "max_tokens": 16, "messages": [{{"role": "user", "content": "'"$(seq -s ' ' 1 600)"'"}}]}}'

The second answer's `cached_tokens` counts the prompt tokens that were not computed again.
Stop the server, start it again, and send it once more: now they come from disk.
"""


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our few options and what goes to the server as it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="", help="a directory or a Hub id; a tiny random model if empty")
    parser.add_argument("--port", type=int, default=8080)
    return parser.parse_known_args()


def model_flags(model: str) -> tuple[str, list[str]]:
    """Name the model and say where the server finds it; build the tiny one if none was given."""
    if not model:
        tiny = CACHE / "tiny-llama"
        subprocess.run([sys.executable, ROOT / "examples" / "tiny_model.py", tiny], check=True)
        # compiling takes longer than it saves here; bfloat16 is emulated on many CPUs
        return "tiny", [f"--model_dir={tiny}", "--enforce-eager", "--dtype=float32"]
    name = Path(model).name
    return name, [f"--model_dir={Path(model).resolve()}" if Path(model).is_dir() else f"--model_id={model}"]


def environment() -> dict[str, str]:
    """Point the server to our configuration file unless the user has one."""
    if "LMCACHE_CONFIG_FILE" not in os.environ and not CONFIG.exists():
        CACHE.mkdir(exist_ok=True)
        CONFIG.write_text(CONFIG_TEXT.format(disk=CACHE / "kv"))
    return {"LMCACHE_CONFIG_FILE": str(CONFIG), "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}


def is_ready(port: int) -> bool:
    """Ask the server once."""
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> int:
    options, server_flags = parse()
    name, flags = model_flags(options.model)
    command = [sys.executable, "-m", "runtime", f"--model_name={name}", *flags, f"--http_port={options.port}"]
    command += ["--kv-transfer-config", KV_TRANSFER, "--enable-prompt-tokens-details", *server_flags]
    server = subprocess.Popen(command, env=environment(), cwd=ROOT)
    # Ctrl-C reaches the server by itself; it drains, and we wait for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    while server.poll() is None and not is_ready(options.port):
        time.sleep(POLL_S)
    if server.poll() is None:
        print(READY_TEXT.format(port=options.port, name=name), flush=True)
    return server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
