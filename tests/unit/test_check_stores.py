"""`check` on volumes, stores, guides and Helm values: one test for each trap."""

import pytest

from tests.traps import CLAIM, EMPTY_DIR, SENTINEL, STORES, VALUES, WITH_DISK, Trap, spring

ARGS = "          args: [redis-server, --maxmemory, 6gb, --maxmemory-policy, allkeys-lru]\n"
LIMITS = "          resources:\n            limits:\n              memory: 8Gi\n"
SERVED = "redis.kv.svc.cluster.local:6379"
SERDE = '  serde: "naive"\n'
VLLM = "      maxModelLen: 16384\n      enablePrefixCaching: true\n"
BUFFER = '      cpuOffloadingBufferSize: "20"\n'
FLAT = "  image:\n    repository: lmcache/vllm-openai\n    tag: v1\n"
FILE_DIR = "          value: /lmcache/lmcache_config.yaml\n"
OPERATOR = """\
apiVersion: production-stack.vllm.ai/v1alpha1
kind: VLLMRuntime
metadata:
  name: mistral
spec:
  lmCacheConfig:
    enabled: true
    cpuOffloadingBufferSize: "4"
"""

STORE_TRAPS = [
    # the disk tier
    Trap(
        "disk-boolean",
        WITH_DISK + EMPTY_DIR[len(WITH_DISK) :],
        (
            (FILE_DIR, FILE_DIR + '        - §name: LMCACHE_LOCAL_DISK\n          value: "True"\n'),
            ("    local_disk: /kv\n    max_local_disk_size: 50\n", ""),
        ),
        None,
    ),
    Trap(
        "disk-read-only",
        EMPTY_DIR,
        (("          mountPath: /kv\n", "          mountPath: /kv\n          §readOnly: true\n"),),
        (),
    ),
    Trap(
        "disk-no-volume",
        EMPTY_DIR.replace(
            "    model:\n      modelFormat:\n        name: huggingface\n",
            "    containers:\n    - name: kserve-container\n      image: runtime:1.0\n",
        ),
        (("    local_disk: /kv\n", "    §local_disk: /cache\n"),),
        None,
    ),
    Trap(
        "emptydir-overflow",
        EMPTY_DIR,
        (("sizeLimit: 60Gi", "sizeLimit: §40Gi # SSD"),),
        (("sizeLimit: 60Gi", "sizeLimit: 55Gi # SSD"),),
    ),
    Trap(
        "emptydir-memory",
        EMPTY_DIR,
        (
            (
                "        emptyDir:\n          sizeLimit: 60Gi",
                "        §emptyDir:\n          medium: Memory\n          sizeLimit: 60Gi",
            ),
        ),
        None,
    ),
    Trap(
        "emptydir-unbounded",
        EMPTY_DIR,
        (("        emptyDir:\n          sizeLimit: 60Gi", "        §emptyDir: {}"),),
        (("        emptyDir:\n          sizeLimit: 60Gi", '        emptyDir: {"sizeLimit": "55Gi"}'),),
    ),
    Trap(
        "ephemeral-overflow",
        EMPTY_DIR,
        (
            (
                "          memory: 24Gi\n          nvidia",
                "          memory: 24Gi\n          ephemeral-storage: §10G\n          nvidia",
            ),
        ),
        (
            (
                "          memory: 24Gi\n          nvidia",
                "          memory: 24Gi\n          ephemeral-storage: 55Gi\n          nvidia",
            ),
        ),
    ),
    Trap("claim-small", CLAIM, (("storage: 60Gi", "storage: §50G"),), (("storage: 60Gi", "storage: 55Gi"),)),
    Trap("claim-once", CLAIM, (("- ReadWriteMany", "- §ReadWriteOnce"),), ()),
    # where remote_url leads
    Trap("remote-localhost", STORES, ((f'"redis://{SERVED}"', '§"lm://localhost:65432"'),), None),
    Trap("remote-port", STORES, ((f'"redis://{SERVED}"', '§"redis://redis.kv.svc.cluster.local:6380"'),), ()),
    Trap(
        "remote-host",
        STORES,
        ((f'"redis://{SERVED}"', '§"redis://rediss.kv.svc:6379"'),),
        ((f'"redis://{SERVED}"', '"redis://redis.kv.svc:6379"'),),
    ),
    Trap(
        "remote-host",
        STORES,
        ((f'"redis://{SERVED}"', '§"redis://redis.default.svc:6379"'),),
        ((f'"redis://{SERVED}"', '"redis://redis.kv.svc:6379"'),),
    ),
    Trap("sentinel-service", SENTINEL, (("redis-sentinel://redis:26379/kv", "§redis-sentinel://redis:26379"),), ()),
    Trap(
        "sentinel-service",
        SENTINEL,
        (("redis-sentinel://redis:26379/kv", "§redis-sentinel://redis:26379/mymaster"),),
        (),
    ),
    Trap("sentinel-port", SENTINEL, (("redis-sentinel://redis:26379/kv", "§redis-sentinel://redis:6379/kv"),), ()),
    Trap(
        "remote-port",
        STORES,
        ((f'"redis://{SERVED}"', '§"redis://redis-0.redis.kv.svc:6380"'),),  # a pod of a StatefulSet
        ((f'"redis://{SERVED}"', '"redis://redis-0.redis.kv.svc:6379"'),),
    ),
    # the stores themselves
    Trap(
        "redis-unbounded",
        STORES,
        ((ARGS, ""), ("        - name: redis\n", "        - §name: redis\n")),
        (
            (ARGS, ""),
            (
                LIMITS,
                LIMITS + "          args:\n          - redis-server\n          - --maxmemory\n"
                "          - 6144mb\n          - --maxmemory-policy\n          - allkeys-lru\n",
            ),
        ),
    ),
    Trap(
        "redis-policy",
        STORES,
        ((", --maxmemory-policy, allkeys-lru", ""), ("        - name: redis\n", "        - §name: redis\n")),
        None,
    ),
    Trap("redis-over-limit", STORES, (("memory: 8Gi", "memory: §6Gi"),), ()),
    Trap("server-unbounded", STORES, ((LIMITS, ""), ("        - name: redis\n", "        - §name: redis\n")), ()),
    Trap("server-replicas", STORES, (("replicas: 1", "replicas: §3"),), ()),
    Trap(
        "server-command",
        STORES,
        ((ARGS, "          command: [§lmcache_experimental_server, 0.0.0.0, '8080']\n"), ("redis:7.4", "runtime:1.0")),
        ((ARGS, "          command: [lmcache_server, 0.0.0.0, '8080']\n"), ("redis:7.4", "runtime:1.0")),
    ),
    Trap("service-port", STORES, (("targetPort: 6379", "targetPort: §6380"),), ()),
    Trap("server-forgets", STORES, (("        - name: redis\n", "        - §name: redis\n"),), None),
    Trap("image-latest", STORES, (("image: redis:7.4", "image: §redis:latest"),), None),
    Trap(
        "placeholder",
        STORES + "---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: s\nstringData:\n  a: b\n",
        (("  a: b\n", "  a: §<YOUR TOKEN>\n  b: §xxxxxx\n"),),
        None,
    ),
]

HELM_TRAPS = [
    Trap("helm-key", VALUES, (("    lmcacheConfig:", "    §lmCacheConfig:"),), ()),
    Trap("helm-key", VALUES, ((VLLM, VLLM + "      §speculative: 3\n"),), None),
    Trap(
        "helm-cache-server",
        VALUES,
        (("cacheserverSpec:\n  enabled: true\n", "§cacheserverSpec:\n"),),
        (("cacheserverSpec:\n  enabled: true\n", "cacheserverSpec:\n"), (SERDE, SERDE + "  enabled: true\n")),
    ),
    Trap(
        "helm-cache-server-image",
        VALUES,
        ((FLAT, "  §repository: lmcache/vllm-openai\n  §tag: v1\n"),),
        ((FLAT, "  image: {repository: lmcache/vllm-openai, tag: v1}\n"),),
    ),
    Trap("helm-cache-server-image-twice", VALUES, ((FLAT, FLAT + "  §tag: v2\n"),), ()),
    Trap("helm-cache-server-replicas", VALUES, (("  replicaCount: 1\n  image", "  replicaCount: §2\n  image"),), ()),
    Trap("helm-serde", VALUES, ((SERDE, '  §serde: ""\n'),), ()),
    Trap("helm-serde", VALUES, ((SERDE, ""), ("cacheserverSpec", "§cacheserverSpec")), ((SERDE, "  serde: naive\n"),)),
    Trap("helm-buffer-fraction", VALUES, (('Size: "20"', 'Size: §"0.5"'),), (('Size: "20"', 'Size: "1"'),)),
    Trap("helm-buffer-unit", VALUES, (('Size: "20"', 'Size: §"20Gi"'),), ()),
    Trap("helm-buffer-unit", OPERATOR, (('Size: "4"', "Size: §4Gi"),), (('Size: "4"', "Size: '4'"),)),
    Trap("helm-disk-path", VALUES, ((BUFFER, BUFFER + '      §diskOffloadingBufferSize: "60"\n'),), None),
    Trap("helm-pd", VALUES, ((BUFFER, BUFFER + "      §enablePD: false\n"),), ()),
    Trap(
        "helm-prefix-caching", VALUES, ((VLLM, "      maxModelLen: 16384\n"), ("    vllmConfig", "    §vllmConfig")), ()
    ),
    Trap("helm-prefix-off", VALUES, (("      enablePrefixCaching: true", "      §enablePrefixCaching: false"),), None),
    Trap("helm-v0", VALUES, ((VLLM, VLLM + "      §v1: 0\n      §v0: '1'\n"),), ()),
    Trap(
        "helm-ray",
        VALUES,
        (("    requestGPU: 1\n", "    requestGPU: 1\n    §raySpec:\n      headNode: {requestCPU: 1}\n"),),
        None,
    ),
    Trap(
        "helm-controller-ports",
        VALUES,
        (
            (
                BUFFER,
                BUFFER + "      enableController: true\n      controllerPort: 9000\n      §controllerReplyPort: 9001\n",
            ),
        ),
        (
            (
                BUFFER,
                BUFFER + "      enableController: true\n      controllerPort: 9000\n      controllerReplyPort: 9001\n",
            ),
            (
                "routerSpec:\n  replicaCount: 1\n",
                "routerSpec:\n  replicaCount: 1\n  extraPorts:\n  - name: lmcache-9001\n"
                "    port: 9001\n    targetPort: 9001\n    protocol: TCP\n",
            ),
        ),
    ),
    Trap(
        "helm-memory",
        VALUES,
        (('requestMemory: "40Gi"', 'requestMemory: §"20Gi"'),),
        (('requestMemory: "40Gi"', 'requestMemory: "24Gi"'),),
    ),
]


@pytest.mark.parametrize("trap", STORE_TRAPS + HELM_TRAPS, ids=lambda trap: trap.id)
def test_trap_is_found_where_it_is_and_mended(trap):
    spring(trap)
