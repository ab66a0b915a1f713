"""What the values do not say: the release's name, and what runs the models here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Arguments of ``lmcache-ext convert``; names of runtimes and image are those of deploy/."""

    release: str = "vllm"
    namespace: str = ""
    runtime: str = ""  # "": one of the two below, by whether a GPU is asked for
    gpu_runtime: str = "lmcache-vllm"
    cpu_runtime: str = "lmcache-vllm-cpu"
    server_image: str = "kserve-lmcache-runtime:0.1.0-server"

    @property
    def secret(self) -> str:
        return f"{self.release}-secrets"

    @property
    def cache_service(self) -> str:
        return f"{self.release}-cache-server-service"

    @property
    def controller_service(self) -> str:
        return f"{self.release}-lmcache-controller-service"

    @property
    def router_service(self) -> str:
        return f"{self.release}-router-service"

    def runtime_for(self, *, on_gpu: bool) -> str:
        return self.runtime or (self.gpu_runtime if on_gpu else self.cpu_runtime)
