"""The manifests: they fit the API's own schemas, what they name is there, what they start parses, and its configuration
loads. No cluster is asked."""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.loading import load_config
from tests.support.deployments import Actor, Learner, actor_of, check_keys_fit, learner_of
from tests.support.kubernetes_schema import KINDS, problems
from tests.support.runs import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]


def only(kind: str) -> dict[str, Any]:
    (document,) = [document for document in DOCUMENTS if document["kind"] == kind]
    return document


def pod(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = only(kind)["spec"]["template"]["spec"]
    return spec


def container(kind: str) -> dict[str, Any]:
    (one,) = pod(kind)["containers"]
    return dict(one)


def arguments(kind: str, environment: dict[str, str]) -> list[str]:
    """As the kubelet passes them: $(NAME) replaced. KeyError for a name that the container does not set."""
    named = {entry["name"]: environment[entry["name"]] for entry in container(kind)["env"]}
    return [re.sub(r"\$\((\w+)\)", lambda name: named[name[1]], word) for word in container(kind)["args"]]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """The file that the ConfigMap mounts."""
    ((name, text),) = only("ConfigMap")["data"].items()
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.fixture
def learner(config_file: Path) -> Learner:
    assert container("Job")["command"] == ["torchrun"]
    return learner_of(arguments("Job", {"NODE_RANK": "1"}), {f"/config/{config_file.name}": config_file})


@pytest.fixture
def actor() -> Actor:
    assert container("Deployment")["command"] == ["python"]
    return actor_of(arguments("Deployment", {"POD_NAME": "actors-7c9d-x2x"}))


FREE = {"data", "labels", "matchLabels", "selector", "limits", "requests"}  # maps with keys of one's own


def places(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to every key of a map of the API's."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(node, dict):
            yield (*path, key)
        if key not in FREE or (key == "selector" and "matchLabels" in value):
            yield from places(value, (*path, key))


def changed(
    document: dict[str, Any], path: tuple[str | int, ...], change: Callable[[Any, Any], None]
) -> dict[str, Any]:
    """A copy in which `change` was done to the map that holds the last key of `path`, and that key."""
    node = copy = deepcopy(document)
    for key in path[:-1]:
        node = node[key]  # type: ignore[index]
    change(node, path[-1])
    return copy


def misspell(node: Any, key: Any) -> None:
    node[f"{key}z"] = node.pop(key)


def mistype(node: Any, key: Any) -> None:
    """A map for what is none, and the other way round."""
    node[key] = "many" if isinstance(node[key], dict | list) else {"many": 1}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_a_document_is_one_of_the_api_and_no_key_or_type_could_be_another(document: dict[str, Any]) -> None:
    assert problems(document) == []
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    for path in places(document):
        assert problems(changed(document, path, misspell)), f"a misspelt {path} is accepted"
        assert problems(changed(document, path, mistype)), f"a mistyped {path} is accepted"


def test_every_kind_is_there() -> None:
    assert {document["kind"] for document in DOCUMENTS} == KINDS.keys()


POD = ("spec", "template", "spec")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("spec", "completionz"), 2, "'completionz' was unexpected"),
        ((*POD, "containers", 0, "imagge"), "async-vapo:latest", "'imagge' was unexpected"),
        (("spec", "backoffLimit"), "many", "'many' is not of type 'integer'"),
        ((*POD, "restartPolicy"), "Sometimes", r"'Sometimes' is not one of \['Always', 'OnFailure', 'Never'\]"),
        (("spec", "completionMode"), "indexed", "'indexed' is not one of"),
        (("spec", "podFailurePolicy", "rules", 0, "action"), "Forget", "'Forget' is not one of"),
        ((*POD, "containers", 0, "ports", 0, "containerPort"), "5555", "'5555' is not of type 'integer'"),
        ((*POD, "containers", 0, "resources", "limits", "nvidia.com/gpu"), "one", "'one' is not valid under any"),
        ((*POD, "containers"), None, "None is not of type 'array'"),
        (("apiVersion",), "v1", "'batch/v1' was expected"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_job_with_a_mistake_is_refused(path: tuple[str | int, ...], value: Any, sentence: str) -> None:
    job = changed(only("Job"), path, lambda node, key: node.update({key: value}))
    (problem,) = problems(job)
    assert re.search(sentence, problem)


def test_pods_are_started_again_by_whom_their_kind_allows() -> None:
    """Those of a Job with a policy for failures never by the kubelet, those of a Deployment always."""
    assert pod("Job")["restartPolicy"] == "Never"
    assert pod("Deployment").get("restartPolicy", "Always") == "Always"
    for kind in ("Job", "Deployment"):
        assert container(kind)["image"] == "async-vapo:latest"


def test_there_is_one_rank_for_each_process_of_each_pod(learner: Learner) -> None:
    spec = only("Job")["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == learner.nodes
    assert learner.config.learner.ranks == learner.nodes * learner.ranks_per_node
    assert learner.node_rank == 1
    assert int(container("Job")["resources"]["limits"]["nvidia.com/gpu"]) == learner.ranks_per_node


def test_everybody_looks_for_rank_0_where_it_is(learner: Learner, actor: Actor) -> None:
    """The name of an Indexed Job's first pod, in the headless service that its pods name as their subdomain."""
    service, job = only("Service"), only("Job")
    assert service["spec"]["clusterIP"] == "None"
    assert pod("Job")["subdomain"] == service["metadata"]["name"]
    rank_0 = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert learner.master == rank_0
    assert actor.connect == f"tcp://{rank_0}:{learner.config.transport.port}"
    assert learner.config.transport.host == "0.0.0.0"


def test_the_ports_agree(learner: Learner) -> None:
    used = {learner.config.transport.port, learner.master_port}
    assert {port["port"] for port in only("Service")["spec"]["ports"]} == used
    assert {port["containerPort"] for port in container("Job")["ports"]} == used


def test_labels_and_selectors_agree() -> None:
    learner_labels = only("Job")["spec"]["template"]["metadata"]["labels"]
    actor_labels = only("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert only("Service")["spec"]["selector"].items() <= learner_labels.items()
    assert not only("Service")["spec"]["selector"].items() <= actor_labels.items(), "actors are not behind its name"
    assert only("Deployment")["spec"]["selector"]["matchLabels"].items() <= actor_labels.items()


@pytest.mark.parametrize("kind", ["Job", "Deployment"])
def test_mounts_volumes_and_what_they_hold_agree(kind: str) -> None:
    volumes = {volume["name"]: volume for volume in pod(kind)["volumes"]}
    assert {mount["name"] for mount in container(kind)["volumeMounts"]} == volumes.keys()
    assert volumes["config"]["configMap"]["name"] == only("ConfigMap")["metadata"]["name"]
    if "runs" in volumes:
        claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
        assert claim == only("PersistentVolumeClaim")["metadata"]["name"]


def test_the_keys_of_learner_and_actors_fit_each_other(learner: Learner, actor: Actor, tmp_path: Path) -> None:
    volumes = {}
    for role, kind in (("learner", "Job"), ("actor", "Deployment")):
        (volumes[role],) = [volume for volume in pod(kind)["volumes"] if volume["name"] == "keys"]
        assert {"name": "keys", "mountPath": "/keys", "readOnly": True} in container(kind)["volumeMounts"]
    check_keys_fit(learner, actor, volumes, tmp_path)


def test_the_run_directory_is_on_the_volume_that_all_ranks_share(learner: Learner) -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container("Job")["volumeMounts"]}
    assert learner.config.runs_dir == mounts["runs"]
    assert "ReadWriteMany" in only("PersistentVolumeClaim")["spec"]["accessModes"]


def test_actors_read_the_learners_configuration_and_have_names_of_their_own(
    learner: Learner, actor: Actor, config_file: Path
) -> None:
    assert actor.name == "actors-7c9d-x2x"
    assert actor.config_files == [f"/config/{config_file.name}"]
    theirs = load_config([str(config_file)], actor.overrides)
    assert theirs.model == learner.config.model
    assert theirs.reward == learner.config.reward


def test_the_grace_period_lets_the_learner_save(learner: Learner) -> None:
    assert learner.shutdown_s == learner.config.learner.stop_timeout_s
    assert pod("Job")["terminationGracePeriodSeconds"] > learner.shutdown_s


def test_the_image_has_what_is_copied_into_it() -> None:
    words = [line.split() for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines()]
    for copied in (line[1] for line in words if line[:1] == ["COPY"]):
        assert (ROOT / copied).exists()
    assert {lock.name for lock in (ROOT / "requirements").iterdir()} >= {"gpu.lock", "cpu.lock"}
