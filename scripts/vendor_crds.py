"""Copies the schemas our manifests are validated against out of checkouts of KServe and the Prometheus operator.

    python scripts/vendor_crds.py KSERVE_CRD_DIR PROMETHEUS_OPERATOR_CRD_DIR

The first holds KServe's `config/crd/full` (also without the `serving.kserve.io_` before the file names), the second the
operator's `example/prometheus-operator-crd-full`. Written to `tests/deploy/crd/`: one JSON file for each kind with its
schema, without descriptions; what none of our manifests may use (other frameworks, transformers, workers) is
left out, so it is an unknown field there. Their licence, Apache-2.0, and commits are in the README beside them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).resolve().parent.parent / "tests" / "deploy" / "crd"

KSERVE = {"clusterservingruntimes": "v1alpha1", "servingruntimes": "v1alpha1", "inferenceservices": "v1beta1"}
PROMETHEUS = {"podmonitors": "v1", "servicemonitors": "v1", "prometheusrules": "v1"}

RUNTIME_UNUSED = {"workerSpec", "builtInAdapter", "storageHelper"}
PREDICTOR_UNUSED = {
    *("huggingface", "lightgbm", "onnx", "paddle", "pmml", "pytorch", "sklearn", "tensorflow", "triton", "xgboost"),
    "workerSpec",
}
SERVICE_USED = {"predictor"}


def find(directory: Path, plural: str) -> Path:
    """The one file in `directory` that defines this plural."""
    found = sorted({*directory.glob(f"*_{plural}.yaml"), *directory.glob(f"{plural}.yaml")})
    if len(found) != 1:
        sys.exit(f"expected one file for {plural} in {directory}, found {len(found)}")
    return found[0]


def without_descriptions(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """The same schema with nothing in it that is only read by people. A property may be called `description`."""
    if isinstance(schema, list):
        return [without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: without_descriptions(one) for name, one in value.items()}
        if key == "properties"
        else without_descriptions(value)
        for key, value in schema.items()
        if key != "description" or not isinstance(value, str)
    }


def prune(plural: str, schema: dict[str, Any]) -> None:
    """Drop what is large and none of our manifests may use."""
    schema["properties"].pop("status", None)
    spec = schema["properties"]["spec"]["properties"]
    if plural == "inferenceservices":
        for name in spec.keys() - SERVICE_USED:
            del spec[name]
        spec = spec["predictor"]["properties"]
    for name in spec.keys() & (PREDICTOR_UNUSED if plural == "inferenceservices" else RUNTIME_UNUSED):
        del spec[name]


def extract(path: Path, plural: str, version: str) -> dict[str, Any]:
    """What of a CustomResourceDefinition says which objects are valid."""
    definition = yaml.safe_load(path.read_text())
    spec = definition["spec"]
    (served,) = [one for one in spec["versions"] if one["name"] == version]
    schema = without_descriptions(served["schema"]["openAPIV3Schema"])
    prune(plural, schema)
    return {
        "apiVersion": f"{spec['group']}/{version}",
        "kind": spec["names"]["kind"],
        "scope": spec["scope"],
        "schema": schema,
    }


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for directory, versions in ((Path(sys.argv[1]), KSERVE), (Path(sys.argv[2]), PROMETHEUS)):
        for plural, version in versions.items():
            found = extract(find(directory, plural), plural, version)
            (TARGET / f"{plural}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
