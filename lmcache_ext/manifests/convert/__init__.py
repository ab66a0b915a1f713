"""Helm values of production-stack as KServe manifests. Every key is mapped, or named with the reason why not."""
