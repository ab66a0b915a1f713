"""Manifests through KServe's own Python classes, and back.

KServe's classes describe themselves with `openapi_types` and know nothing of reading YAML; those of the Kubernetes
client that they hold do. A field that neither has is a KeyError, or comes back missing.
"""

from __future__ import annotations

import re
from typing import Any

import kserve
import kubernetes.client

PLAIN = {"str", "int", "bool", "float", "object", "dict(str, str)"}


def read(kind: str, value: Any) -> Any:
    """An object of KServe's class `kind`, such as "V1beta1InferenceService"."""
    if value is None or kind in PLAIN:
        return value
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        return [read(match[1], item) for item in value]
    ours = getattr(kserve, kind, None)
    if ours is None:
        return getattr(kubernetes.client, kind).from_dict(value)
    attributes = {name: attribute for attribute, name in ours.attribute_map.items()}
    fields = {attributes[name]: read(ours.openapi_types[attributes[name]], one) for name, one in value.items()}
    return ours(**fields)


def written(value: Any) -> Any:
    """The manifest of an object, without what was never set (None; "" for a model's container name)."""
    if isinstance(value, list):
        return [written(item) for item in value]
    if hasattr(value, "attribute_map"):
        pairs = {name: getattr(value, attribute) for attribute, name in value.attribute_map.items()}
        return {name: written(one) for name, one in pairs.items() if one not in (None, "")}
    return value.to_dict() if hasattr(value, "to_dict") else value
