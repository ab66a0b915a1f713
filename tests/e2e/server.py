"""Real server processes for tests and benchmarks.

    with Server(model) as server:            # python -m runtime, ready when the block begins
        print(server.complete("Once upon a time", max_tokens=8))

A server gets a free port, a process group of its own and a log file, and is ended by its pid
whatever happens. `program="vllm"` starts plain vLLM instead.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / ".cache" / "models"
LMCACHE_ARGS = ("--kv-transfer-config", '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}')
MODEL_NAME = "tiny"
MODULES = {"runtime": "runtime", "vllm": "vllm.entrypoints.openai.api_server"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """One server process; a context manager that waits for readiness."""

    def __init__(
        self,
        model: Path | str | None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        program: Literal["runtime", "vllm"] = "runtime",
        name: str = MODEL_NAME,
        kv_space_gib: int = 1,
        max_model_len: int | None = 8192,
        dtype: str = "float32",
        cores: str | None = None,
        wait: bool = True,
        ready_timeout_s: float = 180.0,
    ) -> None:
        """`args` come last and win. `dtype` float32 is what any CPU computes fast, and 8 KiB of KV per token.

        `cores` binds the workers ("1" or, for TP=2, "0|1"); the last core we may use when left out."""
        self.model = model
        self.program = program
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.ready_timeout_s = ready_timeout_s
        self._wait = wait
        self._args = [*self._base_args(max_model_len, dtype), *args]
        self._env = {**_base_env(kv_space_gib, cores), **(env or {})}
        self._client = httpx.Client(base_url=self.url, timeout=120.0)
        self._seen: dict[int, psutil.Process] = {}
        handle, path = tempfile.mkstemp(prefix="server-", suffix=".log")
        os.close(handle)
        self.log_path = Path(path)

    def _base_args(self, max_model_len: int | None, dtype: str) -> list[str]:
        if self.program == "vllm":
            args = ["--served-model-name", self.name, "--port", str(self.port), "--host", "127.0.0.1"]
            args += ["--model", str(self.model)] if self.model is not None else []
        else:
            args = [f"--model_name={self.name}", f"--http_port={self.port}", "--enable_grpc=false"]
            args += [f"--model_dir={self.model}"] if self.model is not None else []
        args += ["--enforce-eager", f"--dtype={dtype}"]
        return args + ([f"--max-model-len={max_model_len}"] if max_model_len is not None else [])

    def __enter__(self) -> Server:
        try:
            self.start()
            if self._wait:
                self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the process

    def start(self) -> None:
        """Start the process; also after the last one ended, on the same port."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULES[self.program], *self._args],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # no session: Linux 6.18 starves other ones while vLLM yields in a loop
            )

    def wait_ready(self) -> None:
        """Return when the server answers requests; AssertionError with the log's end if it ends or takes too long."""
        path = "/v2/health/ready" if self.program == "runtime" else "/health"
        self.wait_for(lambda: self.status(path) == 200, self.ready_timeout_s, "become ready")

    def wait_for(self, condition: Any, timeout_s: float, what: str) -> None:
        """Poll `condition` while the process lives."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.alive, f"the server ended with {self.returncode} before it could {what}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the server did not {what} in {timeout_s:.0f} s:\n{self.tail()}"
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server was not started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def returncode(self) -> int | None:
        return None if self.process is None else self.process.poll()

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the server process alone, as Kubernetes does."""
        self.children()
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code, once it has ended."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end in {timeout_s:.0f} s:\n{self.tail()}") from None

    def stop(self) -> int:
        """SIGTERM and wait: an orderly end."""
        self.terminate()
        return self.wait()

    def kill9(self) -> None:
        """SIGKILL to the whole process group, as the kernel's OOM killer or a lost node would."""
        self.children()
        if self.alive:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait(10.0)
        self._kill_stragglers()

    def close(self) -> None:
        """End everything we started; may be called twice."""
        if self.alive:
            self.terminate()
            try:
                self.wait(45.0)
            except AssertionError:
                self.kill9()
        self._kill_stragglers()
        self._client.close()
        self.log_path.unlink(missing_ok=True)

    def children(self) -> list[psutil.Process]:
        """Every process below the server, living now."""
        if not self.alive:
            return []
        try:
            children: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._seen.update({child.pid: child for child in children})
        return children

    def child(self, title: str) -> psutil.Process:
        """The one child whose command line contains `title`, for example "EngineCore"."""
        found = [child for child in self.children() if title in " ".join(child.cmdline())]
        assert len(found) == 1, f"expected one process titled {title}, found {found}"
        return found[0]

    def survivors(self, grace_s: float = 3.0) -> list[psutil.Process]:
        """Processes once seen below the server that still run after `grace_s`; a zombie does not run."""
        deadline = time.monotonic() + grace_s
        while (alive := [child for child in self._seen.values() if _running(child)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def _kill_stragglers(self) -> None:
        for child in self.survivors(grace_s=0.0):
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(list(self._seen.values()), timeout=10)

    # ---- what it said

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def tail(self, lines: int = 120) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    # ---- HTTP

    def status(self, path: str) -> int:
        """The status of a GET; 0 when nobody listens."""
        try:
            return self._client.get(path, timeout=5.0).status_code
        except httpx.TransportError:
            return 0

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._client.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self._client.post(path, json=body, **options)

    def chat(self, prompt: str, **body: Any) -> dict[str, Any]:
        """A chat completion through KServe's path; raises on any status but 200."""
        message = {"messages": [{"role": "user", "content": prompt}]}
        return self._answer("/chat/completions", {**message, **body})

    def complete(self, prompt: str | list[int], **body: Any) -> dict[str, Any]:
        """A greedy text completion; raises on any status but 200."""
        return self._answer("/completions", {"prompt": prompt, "temperature": 0.0, **body})

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer up to [DONE], which must come."""
        with self._client.stream("POST", path, json={"model": self.name, "stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended without [DONE]")

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, summed over its labels, by name."""
        samples: dict[str, float] = {}
        for line in self.get("/metrics").text.splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name = series.split("{", 1)[0]
                samples[name] = samples.get(name, 0.0) + float(value)
        return samples

    def _answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        prefix = "/openai/v1" if self.program == "runtime" else "/v1"
        response = self.post(prefix + path, {"model": self.name, "max_tokens": 8, **body})
        assert response.status_code == 200, f"{response.status_code}: {response.text}\n{self.tail()}"
        answer: dict[str, Any] = response.json()
        return answer


def cached_tokens(answer: Mapping[str, Any]) -> int:
    """Prompt tokens that were not computed, from vLLM's usage; any cache counts."""
    details = answer["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _base_env(kv_space_gib: int, cores: str | None) -> dict[str, str]:
    """Our environment without what would leak in, with what a CPU engine needs."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "LMCACHE_"))}
    return {
        **env,
        "VLLM_CPU_KVCACHE_SPACE": str(kv_space_gib),
        "VLLM_CPU_OMP_THREADS_BIND": cores or str(max(os.sched_getaffinity(0))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
