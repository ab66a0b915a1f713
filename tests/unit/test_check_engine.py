"""`check` on engines and their settings: one test for each trap."""

import pytest

from tests.traps import ENGINE, RUNTIME, Trap, spring

GRACE = "    terminationGracePeriodSeconds: 60\n"
SHM_MOUNT = "        - name: dshm\n          mountPath: /dev/shm\n"
SHM_VOLUME = "      - name: dshm\n        emptyDir:\n          medium: Memory\n          sizeLimit: 3Gi\n"
TRANSFER = '        - --kv-transfer-config={"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}\n'
FILE = "        - name: LMCACHE_CONFIG_FILE\n          value: /lmcache/lmcache_config.yaml\n"
MOUNT = "        - name: lmcache-config\n          mountPath: /lmcache\n          readOnly: true\n"
OPEN = '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
SIZE = "    max_local_cpu_size: 2.0\n"
MODEL = "    model:\n      modelFormat:\n        name: huggingface\n      args:\n"
RUN_BY = "---\n" + RUNTIME
TEST_KEY = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # printf test | sha256sum
PEER_SETTINGS = """\
    enable_controller: true
    controller_pull_url: controller:8300
    controller_reply_url: controller:8400
    enable_p2p: true
    p2p_init_ports: 8200
"""
PEERS = ENGINE.partition("---\n")[0] + PEER_SETTINGS  # for engines that are elsewhere
COMPLETE = ENGINE.replace("    model:\n", "    model:\n      runtime: lmcache-vllm\n") + RUN_BY

TRAPS = [
    # what the API server refuses
    Trap(
        "api-version",
        ENGINE,
        (("apiVersion: serving.kserve.io/v1beta1\nkind", "§kind"),),
        (),
    ),
    Trap("duplicate-key", ENGINE, (("    minReplicas: 2\n", "    minReplicas: 2\n    §minReplicas: 3\n"),), None),
    Trap(
        "not-a-string",
        ENGINE,
        (("        - --max-model-len=10000\n", "        - --max-model-len\n        - §10000 # tokens\n"),),
        (("        - --max-model-len=10000\n", '        - --max-model-len\n        - "10000" # tokens\n'),),
    ),
    Trap(
        "resource-name",
        ENGINE,
        (("        requests:\n", '        requests:\n          §nvidia.com.gpu: "1"\n'),),
        (("        requests:\n", '        requests:\n          nvidia.com/gpu: "1"\n'),),
    ),
    Trap(
        "quantity",
        ENGINE,
        (("        requests:\n          memory: 24Gi\n", "        requests:\n          memory: §24 GiB\n"),),
        (),
    ),
    Trap(
        "device-limit",
        ENGINE,
        (("        requests:\n", '        requests:\n          nvidia.com/gpu: §"2"\n'),),
        (("        requests:\n", '        requests:\n          nvidia.com/gpu: "1"\n'),),
    ),
    Trap("container-name", RUNTIME, (("name: kserve-container", "§name: vllm"),), ()),
    Trap("kind", ENGINE, (("kind: InferenceService", "kind: §InferenceServise"),), ()),
    Trap("unknown-document", ENGINE, (("# settings\n", "§colour: blue\n---\n"),), None),
    # settings
    Trap("setting-unknown", ENGINE, (("    chunk_size: 256", "    §chunkSize: 256"),), ()),
    Trap(
        "setting-old",
        ENGINE,
        ((SIZE, SIZE + "    §local_device: cpu\n    §pipelined_backend: False\n"),),
        ((SIZE, SIZE + "    local_cpu: true\n"),),
    ),
    Trap("setting-value", ENGINE, ((SIZE, "    max_local_cpu_size: §2 gigs\n"),), None),
    Trap("setting-value", ENGINE, ((SIZE, "    §max_local_cpu_size: 0\n"),), None),
    Trap("chunk-block", ENGINE, (("chunk_size: 256", "chunk_size: §250"),), (("chunk_size: 256", "chunk_size: 240"),)),
    Trap(
        "serde-empty",
        ENGINE,
        ((SIZE, SIZE + '    §remote_serde: ""\n'),),
        ((SIZE, SIZE + '    remote_serde: "naive"\n'),),
    ),
    # quotas
    Trap(
        "quota-salt",
        ENGINE,
        ((SIZE, SIZE + '    extra_config:\n      quotas:\n        §test: 1Gi  # May\n        "*": 500Mi\n'),),
        ((SIZE, SIZE + f'    extra_config:\n      quotas:\n        {TEST_KEY}: 1Gi  # May\n        "*": 500Mi\n'),),
    ),
    Trap("quota-large", ENGINE, ((SIZE, SIZE + "    extra_config: {quotas: {unsalted: §2.0}}\n"),), None),
    Trap(
        "quota-sum",
        ENGINE,
        ((SIZE, SIZE + f"    extra_config: {{§quotas: {{unsalted: 1.5, {TEST_KEY}: 1.5}}}}\n"),),
        None,
    ),
    Trap("setting-value", ENGINE, ((SIZE, SIZE + "    extra_config:\n      §quotas: {unsalted: lots}\n"),), None),
    # from the ConfigMap to the file
    Trap(
        "config-not-mounted",
        ENGINE,
        ((MOUNT, ""), (FILE, FILE.replace("- name", "- §name"))),
        ((MOUNT, ""), (SHM_MOUNT, SHM_MOUNT + MOUNT)),
    ),
    Trap("config-path", ENGINE, (("value: /lmcache/lmcache_config.yaml", "value: §/lmcache/config.yaml"),), ()),
    Trap(
        "config-key",
        ENGINE,
        (
            (
                "        configMap:\n          name: lmcache-config\n",
                "        configMap:\n          name: lmcache-config\n          items:\n"
                "            - key: §lmcache.yaml\n              path: lmcache_config.yaml\n",
            ),
        ),
        (
            (
                "        configMap:\n          name: lmcache-config\n",
                "        configMap:\n          name: lmcache-config\n          items:\n"
                "            - key: lmcache_config.yaml\n              path: lmcache_config.yaml\n",
            ),
        ),
    ),
    Trap(
        "config-subpath",
        ENGINE,
        (
            (
                "mountPath: /lmcache\n",
                "mountPath: /lmcache/lmcache_config.yaml\n          §subPath: lmcache_config.yaml\n",
            ),
        ),
        (),
    ),
    Trap(
        "config-unread",
        ENGINE,
        (
            (FILE, "        - name: A\n          value: b\n"),
            ("        - name: lmcache-config\n", "        - §name: lmcache-config\n"),
            ("sizeLimit: 3Gi", "sizeLimit: 6Gi"),  # for the default of 5
        ),
        ((FILE, "        - name: A\n          value: b\n" + FILE), ("sizeLimit: 3Gi", "sizeLimit: 6Gi")),
    ),
    Trap(
        "volume-undefined",
        COMPLETE,
        ((SHM_MOUNT, SHM_MOUNT + "        - name: §kv\n          mountPath: /kv\n"),),
        None,
    ),
    Trap(
        "config-namespace",
        ENGINE,
        (
            ("  name: llama3\n", "  name: llama3\n  namespace: models\n"),
            ("  name: lmcache-config\ndata", "  name: lmcache-config\n  namespace: §default\ndata"),
        ),
        (
            ("  name: llama3\n", "  name: llama3\n  namespace: models\n"),
            ("  name: lmcache-config\ndata", "  name: lmcache-config\n  namespace: models\ndata"),
        ),
    ),
    Trap(
        "secret-key",
        ENGINE + "---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: hf-secret\nstringData:\n  HF_TOKEN: hf_1\n",
        (
            (
                FILE,
                FILE + "        - name: HF_TOKEN\n          valueFrom:\n"
                "            secretKeyRef: {name: hf-secret, key: §token}\n",
            ),
        ),
        (
            (
                FILE,
                FILE + "        - name: HF_TOKEN\n          valueFrom:\n"
                "            secretKeyRef: {name: hf-secret, key: HF_TOKEN}\n",
            ),
        ),
    ),
    # the command line
    Trap("quoted-arg", ENGINE, ((TRANSFER, f"        - §--kv-transfer-config='{OPEN}'\n"),), ()),
    Trap(
        "quoted-arg",
        ENGINE,
        ((TRANSFER, f"        - --kv-transfer-config\n        - §\"'{OPEN.replace(chr(34), chr(92) + chr(34))}'\"\n"),),
        ((TRANSFER, f'        - --kv-transfer-config\n        - "{OPEN.replace(chr(34), chr(92) + chr(34))}"\n'),),
    ),
    Trap("connector-off", ENGINE, ((TRANSFER, ""), (FILE, FILE.replace("- name", "- §name"))), ()),
    Trap("kv-transfer", ENGINE, ((TRANSFER, TRANSFER.replace("- -", "- §-").replace('kv_both"}', 'kv_both"')),), ()),
    Trap(
        "kv-transfer",
        ENGINE,
        ((TRANSFER, '        - §--kv-transfer-config={"kv_connector":"LMCacheConnectorV1"}\n'),),
        (),
    ),
    Trap(
        "kv-transfer-field",
        ENGINE,
        ((TRANSFER, TRANSFER.replace("- -", "- §-").replace('kv_both"', 'kv_both","kv_rank":0,"kv_buffer_size":1e9')),),
        (),
    ),
    Trap(
        "connector-old", ENGINE, ((TRANSFER, TRANSFER.replace("- -", "- §-").replace("ConnectorV1", "Connector")),), ()
    ),
    Trap("kv-role", ENGINE, ((TRANSFER, TRANSFER.replace("- -", "- §-").replace("kv_both", "kv_producer")),), ()),
    Trap("model-name", ENGINE, (("        - --model_name=", "        - §--model-name="),), ()),
    Trap(
        "workers",
        ENGINE,
        ((TRANSFER, TRANSFER + "        - §--workers=4\n"),),
        ((TRANSFER, TRANSFER + "        - --workers=1\n"),),
    ),
    # variables
    Trap(
        "variable-name",
        ENGINE,
        (
            (
                FILE,
                FILE + "        - name: §LMCACHE_INSTANCE_ID\n          value: a\n"
                "        - name: §LMCACHE_LOCALCPU\n          value: 'true'\n",
            ),
        ),
        (
            (
                FILE,
                FILE + "        - name: LMCACHE_LMCACHE_INSTANCE_ID\n          value: a\n"
                "        - name: LMCACHE_LOCAL_CPU\n          value: 'true'\n",
            ),
        ),
    ),
    Trap(
        "variable-shadowed",
        ENGINE,
        ((FILE, FILE + "        - §name: LMCACHE_CHUNK_SIZE\n          value: '64'\n"),),
        None,
    ),
    Trap(
        "variable-no-op",
        ENGINE,
        ((FILE, FILE + "        - §name: LMCACHE_USE_EXPERIMENTAL\n          value: 'True'\n"),),
        None,
    ),
    Trap(
        "setting-no-effect",
        ENGINE,
        ((SIZE, SIZE + "    §use_layerwise: true\n    extra_config:\n      §ping_timeout: 3\n"),),
        None,
    ),
    Trap("setting-of-pods", PEERS, (("enable_p2p", "§enable_p2p"),), None),
    Trap("setting-value", PEERS, (("enable_p2p", "§enable_p2p"), ("    p2p_init_ports: 8200\n", "")), None),
    Trap("setting-value", PEERS, (("p2p_init_ports: 8200", "p2p_init_ports: §-1"),), None),
    Trap(
        "setting-value",
        ENGINE,
        ((SIZE, SIZE + PEER_SETTINGS.replace("enable_p2p", "§enable_p2p")),),
        None,
    ),
    Trap(
        "token-in-pod",
        ENGINE,
        ((FILE, FILE + "        - name: HF_TOKEN\n          §value: hf_1\n"),),
        (
            (
                FILE,
                FILE
                + "        - name: HF_TOKEN\n          valueFrom: {secretKeyRef: {key: HF_TOKEN, name: hf-secret}}\n",
            ),
        ),
    ),
    # tokens
    Trap(
        "chunk-engine-block",
        ENGINE,
        (("chunk_size: 256", "chunk_size: §96"), (TRANSFER, TRANSFER + "        - --block-size=64\n")),
        (("chunk_size: 256", "chunk_size: 64"), (TRANSFER, TRANSFER + "        - --block-size=64\n")),
    ),
    Trap(
        "chunk-context",
        ENGINE,
        (("chunk_size: 256", "chunk_size: §8192"), ("--max-model-len=10000", "--max-model-len=4096")),
        (("chunk_size: 256", "chunk_size: 1024"), ("--max-model-len=10000", "--max-model-len=4096")),
    ),
    # copiers
    Trap(
        "setting-value",
        ENGINE,
        ((SIZE, SIZE + "    extra_config:\n      host_kv_dtype: fp8\n      §cuda_page_copier: vllm\n"),),
        None,
    ),
    Trap(
        "copier-device",
        COMPLETE,
        (
            (SIZE, SIZE + "    extra_config:\n      cuda_page_copier: §kernels\n"),
            ('          nvidia.com/gpu: "1"\n', ""),
            (', nvidia.com/gpu: "1"}', "}"),
        ),
        None,
    ),
    # probes and shutdown
    Trap("probe-model", RUNTIME, (("path: /v2/health/ready", "path: §/v2/models/{{.Name}}/ready"),), ()),
    Trap(
        "probe-model",
        ENGINE,
        (
            (
                MODEL,
                MODEL.replace(
                    "      args",
                    "      readinessProbe:\n        httpGet:\n"
                    "          path: §/v1/models/huggingface-llama3\n          port: 8080\n      args",
                ),
            ),
        ),
        (
            (
                MODEL,
                MODEL.replace(
                    "      args",
                    "      readinessProbe:\n        httpGet:\n          path: /v2/health/ready\n"
                    "          port: 8080\n      args",
                ),
            ),
        ),
    ),
    Trap(
        "grace-period",
        ENGINE,
        ((GRACE, ""), ("  predictor:\n", "  §predictor:\n")),
        ((GRACE, ""), (SHM_VOLUME, SHM_VOLUME + "    terminationGracePeriodSeconds: 50\n")),
    ),
    Trap(
        "grace-period",
        ENGINE,
        (
            (GRACE, "    §terminationGracePeriodSeconds: 60 # s\n"),
            (
                MODEL,
                MODEL.replace(
                    "      args", "      lifecycle: {preStop: {exec: {command: [sh, -c, sleep 15]}}}\n      args"
                ),
            ),
        ),
        (
            (GRACE, "    terminationGracePeriodSeconds: 70 # s\n"),
            (
                MODEL,
                MODEL.replace(
                    "      args", "      lifecycle: {preStop: {exec: {command: [sh, -c, sleep 15]}}}\n      args"
                ),
            ),
        ),
    ),
    Trap(
        "server-type",
        RUNTIME,
        (
            (
                "  name: lmcache-vllm\n",
                "  name: lmcache-vllm\n  annotations:\n    a: b\n"
                "    §serving.kserve.io/server-type: huggingfaceserver\n",
            ),
        ),
        (("  name: lmcache-vllm\n", "  name: lmcache-vllm\n  annotations:\n    a: b\n"),),
    ),
    Trap(
        "probe-missing",
        RUNTIME,
        (
            ("      livenessProbe:\n        tcpSocket: {port: 8080}\n", ""),
            ("    - name: kserve", "    - §name: kserve"),
        ),
        (
            ("      livenessProbe:\n        tcpSocket: {port: 8080}\n", ""),
            (
                '        limits: {memory: 24Gi, nvidia.com/gpu: "1"}\n',
                '        limits: {memory: 24Gi, nvidia.com/gpu: "1"}\n'
                "      livenessProbe:\n        httpGet:\n          path: /v2/health/live\n          port: 8080\n",
            ),
        ),
    ),
    Trap(
        "knative-lifecycle",
        ENGINE,
        (
            (GRACE, GRACE),
            (MODEL, MODEL.replace("      args", "      §lifecycle: {preStop: {sleep: {seconds: 5}}}\n      args")),
        ),
        None,
    ),
    # host memory
    Trap(
        "memory-limit",
        ENGINE,
        (
            (SIZE, "    max_local_cpu_size: 20\n"),
            ("sizeLimit: 3Gi", "sizeLimit: 21Gi"),
            ("        limits:\n          memory: 24Gi\n", "        limits:\n          memory: §21Gi\n"),
            ("        requests:\n          memory: 24Gi\n", "        requests:\n          memory: 21Gi\n"),
        ),
        ((SIZE, "    max_local_cpu_size: 20\n"), ("sizeLimit: 3Gi", "sizeLimit: 21Gi")),
    ),
    Trap(
        "memory-request",
        ENGINE,
        (("        requests:\n          memory: 24Gi\n", "        requests:\n          memory: §1Gi # small\n"),),
        (("        requests:\n          memory: 24Gi\n", "        requests:\n          memory: 24Gi # small\n"),),
    ),
    Trap(
        "memory-unsaid",
        ENGINE,
        (
            ("          memory: 24Gi\n          nvidia", "          nvidia"),
            ("        requests:\n          memory: 24Gi\n", ""),
            ("    model:\n", "    §model:\n"),
        ),
        (
            (
                '          memory: 24Gi\n          nvidia.com/gpu: "1"\n',
                '          nvidia.com/gpu: "1"\n          memory: 6Gi\n',
            ),
            ("        requests:\n          memory: 24Gi\n", ""),
        ),
    ),
    Trap("shm-missing", COMPLETE, ((SHM_MOUNT, ""), (SHM_VOLUME, ""), ("    model:\n", "    §model:\n")), ()),
    Trap("shm-unseen", ENGINE, ((SHM_MOUNT, ""), (SHM_VOLUME, ""), ("    model:\n", "    §model:\n")), None),
    Trap("shm-small", ENGINE, (("sizeLimit: 3Gi", "sizeLimit: §1Gi"),), ()),
    Trap(
        "shm-medium",
        ENGINE,
        (("        emptyDir:\n          medium: Memory\n", "        §emptyDir:\n"),),
        (
            (
                "          medium: Memory\n          sizeLimit: 3Gi\n",
                "          sizeLimit: 3Gi\n          medium: Memory\n",
            ),
        ),
    ),
]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.id)
def test_trap_is_found_where_it_is_and_mended(trap):
    spring(trap)
