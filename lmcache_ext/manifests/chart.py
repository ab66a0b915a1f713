"""Helm values of production-stack's chart: which keys there are, and the two generations told apart.

The tutorials were written for an older chart than the one they install: it took the cache server's image flat
(``repository``, ``tag``) and started the server because the section was there. The chart of 2026 (0.1.12) wants
``enabled: true`` and ``image.repository``, and ignores what it does not know without a word.
"""

from __future__ import annotations

from collections.abc import Iterator

from lmcache_ext.manifests.nodes import Node


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SECTIONS = _names(
    """
    servingEngineSpec cacheserverSpec routerSpec sharedPvcStorage loraAdapters loraController extraObjects
    grafanaDashboards kube-prometheus-stack prometheus-adapter
    """
)
SERVING = _names(
    """
    configs containerPort containerSecurityContext enableEngine env extraPorts imagePullPolicy labels
    livenessProbe modelSpec readinessProbe runtimeClassName schedulerName securityContext serviceMonitor
    servicePort sidecar startupProbe strategy tolerations vllmApiKey
    """
)
MODEL = _names(
    """
    name enabled annotations podAnnotations labels podLabels serviceAccountName priorityClassName
    runtimeClassName repository tag imagePullSecret modelURL modelRevision chatTemplate chatTemplateConfigMap
    replicaCount resources requestCPU requestMemory requestGPU requestGPUType requestGPUMem
    requestGPUMemPercentage requestGPUCores limitCPU limitMemory limitGPUMem limitGPUMemPercentage limitGPUCores
    pvcStorage pvcAccessMode storageClass pvcMatchLabels pvcLabels pvcAnnotations pvcExistingClaimName
    extraVolumes extraVolumeMounts initContainer vllmConfig lmcacheConfig hf_token envFromSecret env affinity
    nodeSelectorTerms nodeName tolerations tolerationsPolicy shmSize serviceAnnotations enableLoRA enableTool
    toolCallParser keda pdb raySpec
    """
)
VLLM = _names(
    """
    v0 v1 enablePrefixCaching enableChunkedPrefill maxModelLen dtype tensorParallelSize pipelineParallelSize
    maxNumSeqs maxLoras gpuMemoryUtilization runner convert extraArgs prometheusMultiprocDir
    """
)
LMCACHE = _names(
    """
    enabled cpuOffloadingBufferSize diskOffloadingBufferSize logLevel kvRole enableController instanceId
    controllerPort controllerReplyPort workerPorts workerHeartbeatTime p2pHost p2pInitPorts enablePD enableNixl
    nixlRole nixlPeerHost nixlPeerPort nixlBufferSize nixlBufferDevice nixlEnableGc cudaVisibleDevices
    """
)
CACHE_SERVER = _names(
    """
    enabled image repository tag imagePullPolicy imagePullSecrets replicaCount containerPort serviceType
    servicePort serviceAnnotations resources annotations labels strategy livenessProbe tolerations
    runtimeClassName schedulerName securityContext containerSecurityContext priorityClassName nodeSelector
    affinity serde
    """
)
# Keys, wherever they stand, that hold more than a single value.
COMPOSITE = _names(
    """
    annotations podAnnotations labels podLabels resources pvcStorage pvcAccessMode pvcMatchLabels pvcLabels
    pvcAnnotations extraVolumes extraVolumeMounts initContainer envFromSecret env affinity nodeSelectorTerms
    nodeSelector tolerations hf_token vllmApiKey configs securityContext containerSecurityContext strategy
    livenessProbe imagePullSecrets serviceAnnotations extraArgs extraPorts accessModes nfs extraObjects workerPorts
    p2pInitPorts
    """
)


def models(values: Node) -> Iterator[Node]:
    """Each ``servingEngineSpec.modelSpec[]``."""
    return values.items_at("servingEngineSpec", "modelSpec")


def unknown_keys(values: Node) -> Iterator[tuple[Node, frozenset[str]]]:
    """Keys the chart does not know, each with those it knows there."""
    yield from _unknown(values, SECTIONS)
    yield from _unknown(values.at("servingEngineSpec"), SERVING)
    yield from _unknown(values.at("cacheserverSpec"), CACHE_SERVER)
    for model in models(values):
        yield from _unknown(model, MODEL)
        yield from _unknown(model.at("vllmConfig"), VLLM)
        yield from _unknown(model.at("lmcacheConfig"), LMCACHE)


def _unknown(section: Node | None, known: frozenset[str]) -> Iterator[tuple[Node, frozenset[str]]]:
    for pair in section.pairs() if section is not None else ():
        if pair.name not in known and pair.name != "global":
            yield pair, known


def is_old_cache_server(section: Node) -> bool:
    """Whether the cache server is described for the older chart, which needed no ``enabled``."""
    return section.at("enabled") is None


def is_on(section: Node | None) -> bool:
    """Whether a cache server is wanted, by either generation."""
    return section is not None and (is_old_cache_server(section) or section.text_at("enabled") == "true")
