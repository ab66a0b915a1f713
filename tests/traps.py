"""Traps for `check`: manifests that are good, and one thing made wrong in them.

`§` marks where the finding must point. What is checked is the whole file: it has this finding and no other
error or warning, and where the trap can be mended the whole text is as expected, comments included.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from lmcache_ext.manifests.check import Checked, check, mend
from lmcache_ext.manifests.text import File

Changes = tuple[tuple[str, str], ...]

ENGINE = """\
# settings
apiVersion: v1
kind: ConfigMap
metadata:
  name: lmcache-config
data:
  lmcache_config.yaml: |
    # tuned in May
    chunk_size: 256  # tokens
    max_local_cpu_size: 2.0
---
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: llama3
spec:
  predictor:
    minReplicas: 2
    terminationGracePeriodSeconds: 60
    model:
      modelFormat:
        name: huggingface
      args:
        - --model_name=llama3
        - --max-model-len=10000
        - --kv-transfer-config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}
      env:
        - name: LMCACHE_CONFIG_FILE
          value: /lmcache/lmcache_config.yaml
      resources:
        limits:
          memory: 24Gi
          nvidia.com/gpu: "1"
        requests:
          memory: 24Gi
      volumeMounts:
        - name: lmcache-config
          mountPath: /lmcache
          readOnly: true
        - name: dshm
          mountPath: /dev/shm
    volumes:
      - name: lmcache-config
        configMap:
          name: lmcache-config
      - name: dshm
        emptyDir:
          medium: Memory
          sizeLimit: 3Gi
"""

WITH_DISK = ENGINE.replace(
    "    max_local_cpu_size: 2.0\n",
    "    max_local_cpu_size: 2.0\n    local_disk: /kv\n    max_local_disk_size: 50\n",
)
WITH_DISK = WITH_DISK.replace(
    "        - name: dshm\n          mountPath: /dev/shm\n",
    "        - name: dshm\n          mountPath: /dev/shm\n        - name: kv\n          mountPath: /kv\n",
)
EMPTY_DIR = WITH_DISK + "      - name: kv\n        emptyDir:\n          sizeLimit: 60Gi\n"
CLAIM = WITH_DISK + (
    "      - name: kv\n        persistentVolumeClaim:\n          claimName: kv\n"
    "---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata:\n  name: kv\n"
    "spec:\n  accessModes:\n    - ReadWriteMany\n  resources:\n    requests:\n      storage: 60Gi\n"
)

RUNTIME = """\
apiVersion: serving.kserve.io/v1alpha1
kind: ServingRuntime
metadata:
  name: lmcache-vllm
spec:
  supportedModelFormats:
    - name: huggingface
  containers:
    - name: kserve-container
      image: runtime:1.0
      args:
        - --model_name={{.Name}}
      readinessProbe:
        httpGet:
          path: /v2/health/ready
          port: 8080
      livenessProbe:
        tcpSocket: {port: 8080}
      resources:
        limits: {memory: 24Gi, nvidia.com/gpu: "1"}
"""

STORES = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: lmcache-config
  namespace: kv
data:
  lmcache_config.yaml: |
    remote_url: "redis://redis.kv.svc.cluster.local:6379"  # shared
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: redis
  namespace: kv
spec:
  replicas: 1
  template:
    metadata:
      labels: {app: redis}
    spec:
      containers:
        - name: redis
          image: redis:7.4
          args: [redis-server, --maxmemory, 6gb, --maxmemory-policy, allkeys-lru]
          ports:
            - containerPort: 6379
          resources:
            limits:
              memory: 8Gi
---
apiVersion: v1
kind: Service
metadata:
  name: redis
  namespace: kv
spec:
  selector: {app: redis}
  ports:
    - port: 6379
      targetPort: 6379
"""

SENTINEL = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: lmcache-config
data:
  lmcache_config.yaml: |
    remote_url: redis-sentinel://redis:26379/kv
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: sentinel
data:
  sentinel.conf: |
    sentinel monitor kv redis-0.redis 6379 2
"""

VALUES = """\
# values of the chart of 2026
servingEngineSpec:
  modelSpec:
  - name: mistral
    repository: lmcache/vllm-openai
    tag: v1
    modelURL: mistralai/Mistral-7B-Instruct-v0.2
    replicaCount: 1
    requestCPU: 10
    requestMemory: "40Gi"
    requestGPU: 1
    vllmConfig:
      maxModelLen: 16384
      enablePrefixCaching: true
    lmcacheConfig:
      enabled: true
      cpuOffloadingBufferSize: "20"
cacheserverSpec:
  enabled: true
  replicaCount: 1
  image:
    repository: lmcache/vllm-openai
    tag: v1
  serde: "naive"
routerSpec:
  replicaCount: 1
"""


class Trap(NamedTuple):
    """`rule` must find what `changes` make of `base`; `mended` (of `base`, too) is what --fix writes, None nothing."""

    rule: str
    base: str
    changes: Changes
    mended: Changes | None

    @property
    def id(self) -> str:
        return self.rule


def changed(text: str, changes: Changes) -> str:
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks, and their lines and columns."""
    places = []
    for number, line in enumerate(text.split("\n"), start=1):
        for index, char in enumerate(line):
            if char == "§":
                places.append((number, index + 1 - line[:index].count("§")))
    return text.replace("§", ""), places


def checked(text: str, name: str = "trap.yaml") -> Checked:
    result = check([File(name, text)])
    assert not result.unreadable
    return result


def failures(result: Checked) -> list[tuple[str, int, int]]:
    """(rule, line, column) of every error and warning."""
    return [(one.rule, one.place.line, one.place.column) for one in result.findings if one.severity != "note"]


@cache
def is_good(text: str) -> bool:
    return not failures(checked(text))


def spring(trap: Trap) -> None:
    """Assert what is found in a trap, and what --fix makes of it."""
    assert is_good(trap.base), "the manifest is not good to begin with"
    text, places = marked(changed(trap.base, trap.changes))
    result = checked(text)
    found = [(one.rule, one.place.line, one.place.column) for one in result.findings if one.rule == trap.rule]
    assert found == [(trap.rule, line, column) for line, column in places], f"found {found}, expected at {places}"
    others = [one for one in failures(result) if one[0] != trap.rule]
    assert not others, others
    after = mend([File("trap.yaml", text)])
    if trap.mended is None:
        assert not after.fixed
        assert not any(one.fixable for one in result.findings)
        return
    assert [file.text for file in after.fixed] == [changed(trap.base, trap.mended)], after.fixed[0].text
    assert not failures(after), failures(after)
