"""A container of a pod, run on this machine as kubelet and a container runtime would run it.

What is real: process 1 of its own pid namespace, the image's user and the pod's fsGroup, no capabilities, a read-only
root, volumes at the paths of the manifest (memory-backed ones with their limit), ConfigMaps and Secrets as kubelet's
directories with `..data`, environment with `$(NAME)` filled in, probes, preStop, SIGTERM, and SIGKILL when the grace
period is over.

What is not: the image's files are this machine's and this checkout's, memory limits are told but not enforced, and the
network is either shared with this machine, each port mapped to a free one, or has nobody else in it, or is a namespace
of the test's with other pods on a bridge.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.deploy.image import Image
from tests.deploy.manifests import ROOT, quantity
from tests.kubelet import ConfigMapVolume

Manifest = dict[str, Any]

# Of this machine's root, in place of the image's; of /etc only what programs need to run, so no user has a name.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/opt", "/sys")
ETC = ("alternatives", "hosts", "ld.so.cache", "localtime", "nsswitch.conf", "resolv.conf", "ssl")
# A probe from within the pod, where nothing else reaches it; urllib takes any 4xx or 5xx for an error.
GET = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2]))"
VARIABLE = re.compile(r"\$\((\w+)\)")


def sandbox() -> str:
    """The program that isolates; the test is skipped where it cannot be had."""
    found = shutil.which("bwrap")
    if found and os.geteuid() == 0:
        return found
    pytest.skip("needs root and bubblewrap to play kubelet: apt-get install bubblewrap")


class Pod:
    """One container of a pod's spec, and the volumes it mounts, which outlive it."""

    def __init__(
        self,
        name: str,
        spec: Manifest,
        image: Image,
        directory: Path,
        *,
        config_maps: Mapping[str, Mapping[str, str]],
        secrets: Mapping[str, Mapping[str, str]] = {},
        ports: Mapping[int, int] = {},
        mounts: Mapping[str, Path] = {},
        programs: Path | None = None,
        network: str | None = None,
        hosts: str | None = None,
        ip: str = "127.0.0.1",
    ) -> None:
        """`ports` maps a port of the manifest to one of this machine; without any the pod has its own network.

        `mounts` are directories from elsewhere, `programs` is one for PATH; `network` is a namespace that exists,
        `hosts` what its names are and `ip` the pod's address there.
        """
        self._bwrap = sandbox()
        self.name, self.spec, self.image, self.directory = name, spec, image, directory
        (self.container,) = spec["containers"]
        self.ports = dict(ports)
        self._fields = {"metadata.name": name, "status.podIP": ip}
        self._programs, self._network, self._hosts = programs, network, hosts
        self._config_maps, self._secrets, self._mounts = config_maps, secrets, mounts
        self.volumes: dict[str, ConfigMapVolume] = {}
        self._paths = {volume["name"]: self._make(volume) for volume in spec.get("volumes", [])}
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.log_path = directory / "log"

    # ---- volumes

    def _make(self, volume: Manifest) -> Path:
        path = self.directory / "volumes" / volume["name"]
        path.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            self.volumes[volume["name"]] = ConfigMapVolume(path, self._config_maps[volume["configMap"]["name"]])
        elif "secret" in volume:
            ConfigMapVolume(path, self._secrets[volume["secret"]["secretName"]])
        elif "emptyDir" in volume:
            path.chmod(0o777)
        else:  # a claim: its root belongs to fsGroup, as kubelet sees to
            os.chown(path, 0, self._fs_group)
            path.chmod(0o2775)
        return path

    @property
    def _fs_group(self) -> int:
        return int(self.spec.get("securityContext", {}).get("fsGroup", 0))

    def _binds(self) -> Iterator[str]:
        sources = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        for mount in self.container.get("volumeMounts", []):
            empty = sources[mount["name"]].get("emptyDir", {}) if mount["name"] in sources else {}
            yield from _parents(mount["mountPath"])
            if empty.get("medium") == "Memory":
                yield from (
                    "--perms",
                    "1777",
                    "--size",
                    str(quantity(empty["sizeLimit"])),
                    "--tmpfs",
                    mount["mountPath"],
                )
            else:
                kind = "--ro-bind" if mount.get("readOnly") else "--bind"
                yield from (kind, str(self._paths[mount["name"]]), mount["mountPath"])
        mounts = dict(self._mounts)
        if self._programs is not None:
            mounts[str(self._programs)] = self._programs
        for target, source in mounts.items():
            yield from (*_parents(target), "--ro-bind", str(source), target)

    # ---- the process

    def start(self) -> None:
        """Start the container; returns before it is ready."""
        read, write = os.pipe()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self._enter_network(),
                    *self._sandbox(write),
                    *self._user(),
                    "env",
                    "-i",
                    *self._environment(),
                    *self._command(),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                process_group=0,  # no session: Linux 6.18 starves other ones while vLLM yields in a loop
            )
        os.close(write)
        with os.fdopen(read) as info:
            self.pid = json.loads(info.read())["child-pid"]

    def _enter_network(self) -> list[str]:
        return [] if self._network is None else ["nsenter", f"--net=/run/netns/{self._network}"]

    def _sandbox(self, info_fd: int) -> list[str]:
        cgroup = self.directory / "cgroup"
        cgroup.mkdir(exist_ok=True)
        (cgroup / "memory.max").write_text(f"{quantity(self.container['resources']['limits']['memory'])}\n")
        paths = [*SYSTEM, *(f"/etc/{name}" for name in ETC)]
        system = [word for path in paths if Path(path).exists() for word in _system(path)]
        python = {str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, ROOT)}
        python -= {path for path in python if path.startswith("/usr")}
        return [
            *(self._bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--as-pid-1", "--die-with-parent"),
            *("--hostname", self.name, "--info-fd", str(info_fd)),
            *([] if self.ports or self._network else ["--unshare-net"]),
            *(*system, "--proc", "/proc", "--dev", "/dev", "--ro-bind", str(cgroup), "/sys/fs/cgroup"),
            *self._names(),
            *self._binds(),
            # after the pod's own mounts: a volume at /tmp must not hide a checkout that lies below it
            *(word for path in sorted(python) for word in (*_parents(path), "--ro-bind", path, path)),
            *("--remount-ro", "/", "--chdir", "/opt"),
        ]

    def _names(self) -> list[str]:
        if self._hosts is None:
            return []
        file = self.directory / "hosts"
        file.write_text(f"127.0.0.1 localhost\n{self._hosts}")
        return ["--ro-bind", str(file), "/etc/hosts"]

    def _user(self) -> list[str]:
        security = {**self.spec.get("securityContext", {}), **self.container["securityContext"]}
        uid = security.get("runAsUser", self.image.uid)
        assert uid or not security.get("runAsNonRoot"), "the image's user is root, and the pod forbids it"
        assert security["capabilities"] == {"drop": ["ALL"]}
        groups = [f"--groups={self._fs_group}"] if self._fs_group else ["--clear-groups"]
        gid = security.get("runAsGroup", self.image.gid)
        caps = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        return ["setpriv", f"--reuid={uid}", f"--regid={gid}", *groups, *caps]

    def environment(self) -> dict[str, str]:
        """The image's variables and the container's, in order, `$(NAME)` filled in from those before."""
        found = {**self.image.env, "HOSTNAME": self.name, "PATH": self._path()}
        for one in self.container.get("env", []):
            if "valueFrom" in one:
                found[one["name"]] = self._value_from(one["valueFrom"])
            else:
                found[one["name"]] = VARIABLE.sub(lambda match: found.get(match[1], match[0]), one.get("value", ""))
        return found

    def _path(self) -> str:
        """Where the image's programs are on this machine."""
        own = f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        return own if self._programs is None else f"{self._programs}:{own}"

    def _value_from(self, source: Manifest) -> str:
        if "fieldRef" in source:
            return self._fields[source["fieldRef"]["fieldPath"]]
        return self._secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]

    def _environment(self) -> list[str]:
        env = {**self.environment(), "PYTHONPATH": str(ROOT)}  # the image has the package installed
        return [f"{name}={value}" for name, value in env.items()]

    def _command(self) -> list[str]:
        words = [*self.container["command"], *self.container.get("args", [])]
        return [self._mapped(word) for word in words]

    def _mapped(self, word: str) -> str:
        """The word with this machine's ports for the manifest's."""
        for port, ours in self.ports.items():
            word = re.sub(rf"(^|[=:]){port}(?=$|[,}}])", rf"\g<1>{ours}", word)
        return word

    # ---- what kubelet does with it

    def probe(self, kind: str) -> bool:
        """Whether a probe of the manifest succeeds now."""
        probe = self.container[kind]
        timeout_s = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            return self.run(*probe["exec"]["command"], timeout_s=timeout_s) is not None
        port = probe["httpGet"]["port"]
        url = f"http://127.0.0.1:{self.ports.get(port, port)}{probe['httpGet']['path']}"
        if self._network is not None:
            return self.run("python", "-c", GET, url, str(timeout_s), timeout_s=timeout_s + 5) is not None
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                return 200 <= answer.status < 400
        except (urllib.error.URLError, OSError):
            return False

    def wait_started(self, timeout_s: float) -> None:
        """Until the startup probe, or the readiness probe where there is none, succeeds."""
        kind = "startupProbe" if "startupProbe" in self.container else "readinessProbe"
        deadline = time.monotonic() + timeout_s
        while not self.probe(kind):
            assert self.alive, f"{self.name} ended with {self.process and self.process.poll()}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"{self.name} did not start in {timeout_s:.0f} s:\n{self.tail()}"
            time.sleep(0.2)

    def run(self, *command: str, timeout_s: float) -> str | None:
        """Exec in the container, as probes and hooks do: what it printed, or None where it failed or took too long."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--ipc", "--uts", "--net"]
        words = [*enter, *self._user(), "env", "-i", *self._environment(), *command]
        try:
            done = subprocess.run(words, capture_output=True, timeout=timeout_s, check=False, text=True)
        except subprocess.TimeoutExpired:
            return None
        return done.stdout if done.returncode == 0 else None

    def stop(self) -> int:
        """preStop, SIGTERM, and SIGKILL when the grace period is over: the exit code, or -SIGKILL."""
        assert self.process is not None
        deadline = time.monotonic() + self.spec.get("terminationGracePeriodSeconds", 30)
        hook = self.container.get("lifecycle", {}).get("preStop")
        if hook is not None:
            assert self.run(*hook["exec"]["command"], timeout_s=deadline - time.monotonic()) is not None
        os.kill(self.pid, signal.SIGTERM)
        try:
            return self.process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def kill(self) -> None:
        """End the container at once; with process 1 goes all in it."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait(10)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def processes(self) -> list[psutil.Process]:
        """All in the container, process 1 first."""
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def tail(self, lines: int = 80) -> str:
        return "\n".join(self.log().splitlines()[-lines:])


def _system(path: str) -> tuple[str, ...]:
    if Path(path).is_symlink():
        return ("--symlink", os.readlink(path), path)
    return (*_parents(path), "--ro-bind", path, path)


def _parents(path: str) -> Iterator[str]:
    """Make the directories above a mount; bubblewrap's own are for root only."""
    for parent in reversed(Path(path).parents[:-1]):
        yield from ("--perms", "0755", "--dir", str(parent))
