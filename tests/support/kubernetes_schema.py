"""The strict schemas of what deploy/kubernetes uses, and what of a document they refuse.

    python -m tests.support.kubernetes_schema FOLDER

makes kubernetes_schema.json out of the folder v1.36.0-local-strict of the package kubernetes-validate (here 1.37.0),
whose schemas are made from the API's own description. That package takes 110 MB for all versions and kinds, so we keep
what our kinds refer to. Descriptions are left out. An empty value counts as a mistake, although the API ignores it.
"""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FILE = Path(__file__).with_suffix(".json")
CORE, META = "io.k8s.api.core.v1", "io.k8s.apimachinery.pkg.apis.meta.v1"
KINDS = {
    "ConfigMap": f"{CORE}.ConfigMap",
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "Job": "io.k8s.api.batch.v1.Job",
    "PersistentVolumeClaim": f"{CORE}.PersistentVolumeClaim",
    "Service": f"{CORE}.Service",
}
# The API's description has these words in its texts only: definition, field -> what it may be.
WORDS = {
    (f"{CORE}.PodSpec", "restartPolicy"): ["Always", "OnFailure", "Never"],
    (f"{CORE}.PodSpec", "dnsPolicy"): ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    (f"{CORE}.Container", "imagePullPolicy"): ["Always", "IfNotPresent", "Never"],
    (f"{CORE}.ContainerPort", "protocol"): ["TCP", "UDP", "SCTP"],
    (f"{CORE}.ServicePort", "protocol"): ["TCP", "UDP", "SCTP"],
    (f"{CORE}.ServiceSpec", "type"): ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
    (f"{CORE}.EmptyDirVolumeSource", "medium"): ["", "Memory"],
    (f"{CORE}.Toleration", "operator"): ["Equal", "Exists", "Gt", "Lt"],
    ("io.k8s.api.batch.v1.JobSpec", "completionMode"): ["Indexed", "NonIndexed"],
    ("io.k8s.api.batch.v1.PodFailurePolicyRule", "action"): ["Count", "FailIndex", "FailJob", "Ignore"],
    ("io.k8s.api.batch.v1.PodFailurePolicyOnPodConditionsPattern", "status"): ["False", "True", "Unknown"],
    ("io.k8s.api.apps.v1.DeploymentStrategy", "type"): ["Recreate", "RollingUpdate"],
}
ACCESS_MODES = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]
QUANTITY = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"


@cache
def definitions() -> dict[str, Any]:
    """By full name."""
    made: dict[str, Any] = json.loads(FILE.read_text())
    return made


def problems(document: Any, definition: str | None = None) -> list[str]:
    """What is wrong with a document, or with a part of one that is of this definition."""
    if definition is None:
        if not isinstance(document, dict) or str(document.get("kind")) not in KINDS:
            return [f"a document of no kind that we know: {document}"]
        definition = KINDS[document["kind"]]
    schema = {"$ref": f"#/$defs/{definition}", "$defs": definitions()}
    found = Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def _make(folder: Path) -> dict[str, Any]:
    theirs = json.loads((folder / "_definitions.json").read_text())["$defs"]
    made: dict[str, Any] = {}
    todo = list(KINDS.values())
    while todo:
        name = todo.pop()
        if name not in made:
            made[name] = _plain(theirs[name])
            todo += _referred(made[name])
    for kind, name in KINDS.items():
        version = "/".join(name.split(".")[3:5]) if ".core." not in name else "v1"
        made[name]["required"] = ["apiVersion", "kind", "metadata", *(["spec"] if kind != "ConfigMap" else [])]
        made[name]["properties"] |= {"apiVersion": {"const": version}, "kind": {"const": kind}}
    for (name, field), words in WORDS.items():
        assert made[name]["properties"][field]["type"] == "string"
        made[name]["properties"][field]["enum"] = words
    made[f"{CORE}.PersistentVolumeClaimSpec"]["properties"]["accessModes"]["items"] = {"enum": ACCESS_MODES}
    made["io.k8s.apimachinery.pkg.api.resource.Quantity"] = {
        "oneOf": [{"type": "string", "pattern": QUANTITY}, {"type": "number"}]
    }
    return dict(sorted(made.items()))


def _plain(node: Any) -> Any:
    """Without descriptions, and without null as a type."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {
        key: _plain(value)
        for key, value in node.items()
        if not (key == "description" and isinstance(value, str)) and not key.startswith("x-kubernetes")
    }
    if isinstance(kinds := plain.get("type"), list):
        (plain["type"],) = [kind for kind in kinds if kind != "null"]
    return plain


def _referred(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"].rpartition("/")[2]
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _referred(value)


if __name__ == "__main__":
    lines = [
        f"{json.dumps(name)}:{json.dumps(made, separators=(',', ':'))}"
        for name, made in _make(Path(sys.argv[1])).items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
