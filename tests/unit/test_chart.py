"""The chart: what it renders is valid for Kubernetes and its operators, and says what matters."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from chart import CHART, ROOT, VALUE_SETS, environment, helm, named, of_kind, pod_spec, pods, render, values

from orchestrator.settings import Settings, load_settings

#: The oldest that Chart.yaml admits, and the newest there are schemas for.
KUBERNETES = ("1.29", "1.37")
#: Schemas of custom resources; not part of this project. Each file: {"group", "version", "kind", "openAPIV3Schema"}.
CRDS = Path(os.environ.get("CRD_SCHEMAS", ROOT.parent / "shared" / "crds"))

SETS = [None, *VALUE_SETS]
#: More ways through the templates than the value sets take.
SWITCHES = (
    ("hpa", None, ("autoscaling.kind=hpa",)),
    ("no-autoscaling", None, ("autoscaling.kind=none",)),
    ("prometheus", "production", (
        "autoscaling.keda.trigger=prometheus", "autoscaling.keda.prometheus.serverAddress=http://prometheus:9090",
    )),
    ("open", None, ("networkPolicy.enabled=false", "serviceAccounts.worker.create=false")),
    ("ways", None, (
        "networkPolicy.extraEgress[0].ports[0].port=988", "networkPolicy.extraEgress[0].to[0].ipBlock.cidr=10.0.0.0/8",
        "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=watch", "networkPolicy.exceptCidrs=null",
    )),
    ("names", "production", ("fullnameOverride=b", "serviceAccounts.worker.name=mine", "commonLabels.team=a")),
)  # fmt: skip
RENDERED = [*(pytest.param(name, (), id=name or "defaults") for name in SETS),
            *(pytest.param(base, sets, id=name) for name, base, sets in SWITCHES)]  # fmt: skip


def test_the_value_sets_are_there() -> None:
    assert set(VALUE_SETS) == {"minimal", "production", "spot", "multi-model"}


@pytest.mark.parametrize(("name", "sets"), RENDERED)
def test_lint_is_silent(name: str | None, sets: tuple[str, ...]) -> None:
    report = helm().lint(CHART, values(name, *sets), strict=True)
    assert not report["errors"]
    said = [message for message in report["messages"] if message["error"] != "icon is recommended"]
    assert not said


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize(("name", "sets"), RENDERED)
def test_every_document_is_what_kubernetes_takes(name: str | None, sets: tuple[str, ...], version: str) -> None:
    documents = [document for document in render(name, *sets) if not _custom(document)]
    assert len(documents) >= 8
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validator_finds_mistakes() -> None:
    deployment = named(render(), "Deployment", "rel-blip-batch-worker-default")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


@pytest.mark.parametrize(("name", "sets"), RENDERED)
def test_every_custom_resource_is_what_its_operator_takes(name: str | None, sets: tuple[str, ...]) -> None:
    schemas = _custom_schemas()
    for document in filter(_custom, render(name, *sets)):
        group, version = document["apiVersion"].split("/")
        jsonschema.validate(document, schemas[group, version, document["kind"]])


def _custom(document: dict[str, Any]) -> bool:
    return document["apiVersion"].split("/")[0] in {"keda.sh", "monitoring.coreos.com"}


def _custom_schemas() -> dict[tuple[str, str, str], dict[str, Any]]:
    files = sorted(CRDS.glob("*.json"))
    if not files:
        pytest.skip(f"no schemas of custom resources in {CRDS}; CRD_SCHEMAS names a folder with them")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return {(one["group"], one["version"], one["kind"]): _strict(one["openAPIV3Schema"]) for one in found}


def _strict(schema: Any) -> Any:
    """The API server drops fields it does not know without a word; here they are mistakes."""
    if isinstance(schema, list):
        return [_strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("pattern"), str):  # Go's regular expressions take a flag anywhere
        closed["pattern"] = re.sub(r"^\^\(\?i\)", "(?i)^", schema["pattern"])
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if not schema["properties"].keys() - {"apiVersion", "kind", "metadata", "spec", "status"}:
            closed["properties"]["metadata"] = {"type": "object"}  # the root: every object's own
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed


# What matters


@pytest.mark.parametrize("name", SETS)
def test_pods_have_no_rights(name: str | None) -> None:
    found = pods(render(name))
    assert len(found) >= 3
    for who, pod in found:
        assert pod["automountServiceAccountToken"] is False, who
        assert pod["enableServiceLinks"] is False, who  # a Service's variables must not pass for settings
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}, who
        assert pod["securityContext"]["runAsNonRoot"] is True, who
        assert pod["securityContext"]["runAsUser"] > 0, who
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, who
        kinds = {kind for volume in pod.get("volumes", ()) for kind in volume} - {"name"}
        own_directory = {"hostPath"} if who == "rel-blip-batch-worker-cpu" else set()  # a value set asks for it
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"} | own_directory, who
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, who
            assert context["allowPrivilegeEscalation"] is False, who
            assert context["capabilities"] == {"drop": ["ALL"]}, who
            assert "privileged" not in context, who


@pytest.mark.parametrize("name", SETS)
def test_containers_have_bounds_and_versions(name: str | None) -> None:
    for who, pod in pods(render(name)):
        for container in pod["containers"]:
            assert container["resources"]["limits"]["memory"], who
            assert container["resources"]["requests"]["cpu"], who
            tag = container["image"].rpartition("/")[2]
            assert ":" in tag, who
            assert not tag.endswith(":latest"), who


@pytest.mark.parametrize("name", SETS)
def test_what_serves_is_probed(name: str | None) -> None:
    for document in render(name):
        pod = pod_spec(document)
        if pod is None or document["kind"] == "Pod":
            continue
        (container,) = pod["containers"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def workers(name: str | None = None, *sets: str) -> dict[str, dict[str, Any]]:
    """Worker pods by the name of their pool."""
    found = of_kind(render(name, *sets), "Deployment")
    pools = {document["metadata"]["labels"].get("blip-batch/pool"): pod_spec(document) for document in found}
    return {pool: pod for pool, pod in pools.items() if pool and pod}


@pytest.mark.parametrize("name", SETS)
def test_the_grace_period_covers_the_drain(name: str | None) -> None:
    for pool, pod in workers(name).items():
        (container,) = pod["containers"]
        drain = float(environment(container)["BLIP_DRAIN_SECONDS"])
        wait = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] >= drain + wait + 10, pool


def test_a_longer_drain_has_a_longer_grace_period() -> None:
    (pod,) = workers(None, "workerPools.default.drainSeconds=3600").values()
    assert environment(pod["containers"][0])["BLIP_DRAIN_SECONDS"] == "3600"
    assert pod["terminationGracePeriodSeconds"] == 3617


def test_a_worker_of_a_gpu_pool_has_one_gpu() -> None:
    (pod,) = workers().values()
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "12Gi", "nvidia.com/gpu": 1}
    assert environment(container)["BLIP_DEVICE"] == "cuda"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


def test_pools_differ_in_models_gpus_and_nodes() -> None:
    pools = workers("multi-model")
    containers = {pool: pod["containers"][0] for pool, pod in pools.items()}
    settings = {pool: environment(container) for pool, container in containers.items()}
    assert settings["captions"]["BLIP_MODELS"] == "Salesforce/blip-image-captioning-large"
    assert settings["captions"]["BLIP_SLOTS"] == "1024"
    assert containers["captions"]["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 1
    assert pools["captions"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pools["captions"]["runtimeClassName"] == "nvidia"
    assert not any("nvidia" in resource for resource in containers["cpu"]["resources"]["limits"])
    assert settings["cpu"] | {"BLIP_DEVICE": "cpu", "BLIP_PRECISION": "int8"} == settings["cpu"]
    assert settings["default"]["BLIP_MODELS"] == ""
    assert "BLIP_SLOTS" not in settings["default"]


def test_a_worker_may_take_as_long_to_start_as_its_value_says() -> None:
    (pod,) = workers(None, "workerPools.default.startupSeconds=1801").values()
    probe = pod["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1801


def test_liveness_asks_for_progress() -> None:
    for pod in workers("production").values():
        (container,) = pod["containers"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
        port = {port["name"]: port["containerPort"] for port in container["ports"]}["metrics"]
        assert environment(container)["BLIP_METRICS_PORT"] == str(port)
        assert environment(container)["BLIP_METRICS_HOST"] == "0.0.0.0"


def test_what_a_worker_writes_has_a_place() -> None:
    (pod,) = workers("production").values()
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts == {
        "scratch": "/tmp", "shared-memory": "/dev/shm", "models": "/models", "redis-ca": "/etc/blip/redis"
    }  # fmt: skip
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert volumes["models"]["persistentVolumeClaim"] == {"claimName": "models"}
    assert environment(pod["containers"][0])["HF_HOME"] == mounts["models"]


@pytest.mark.parametrize(
    ("more", "loaders", "threads"),
    [
        ("resources.requests.cpu=6", "6", "6"),
        ("resources.requests.cpu=2500m", "3", "3"),
        ("resources.requests.cpu=100m", "1", "1"),
        ("resources.requests.cpu=64", "32", "64"),
        ("resources.limits.cpu=10", "10", "10"),  # above a request of 4
        ("gpu.enabled=false", "2", "4"),
        ("gpu.enabled=false,workerPools.default.resources.requests.cpu=1", "1", "1"),
        ("gpu.enabled=false,workerPools.default.resources.requests.cpu=64", "8", "64"),
        ("settings.BLIP_LOADERS=5", "5", "4"),
        ("precision=auto,settings.BLIP_LOADERS=5", "5", "4"),  # of all pools
        ("resources.requests.cpu=0", None, None),  # the worker looks for itself
    ],
)
def test_a_worker_uses_the_cores_that_its_pool_asks_for(more: str, loaders: str | None, threads: str | None) -> None:
    (pod,) = workers(None, f"workerPools.default.{more}").values()
    (container,) = pod["containers"]
    settings = environment(container)
    assert (settings.get("BLIP_LOADERS"), settings.get("OMP_NUM_THREADS")) == (loaders, threads)


@pytest.mark.parametrize("name", SETS)
def test_no_variable_is_given_twice(name: str | None) -> None:
    for who, pod in pods(render(name, "s3.region=eu-central-1")):
        given = [entry["name"] for container in pod["containers"] for entry in container.get("env", ())]
        assert len(given) == len(set(given)), who
        if "BLIP_REDIS_URL" in given:
            known = environment(pod["containers"][0])
            assert known["AWS_REGION"] == known["AWS_DEFAULT_REGION"] == "eu-central-1"  # boto3 reads only the latter


@pytest.mark.parametrize(
    ("cache", "compiled", "read_only"),
    [
        ((), "/tmp/compiled", False),
        (("existingClaim=models",), "/models/compiled", False),  # every pod that comes later has it
        (("existingClaim=models", "readOnly=true"), "/tmp/compiled", True),
        (("hostPath=/var/lib/models",), "/tmp/compiled", False),  # whose owner may be anybody
        (("hostPath=/var/lib/models", "readOnly=true"), "/tmp/compiled", True),
    ],
)
def test_compiled_code_is_kept_where_it_can_be_written(cache: tuple[str, ...], compiled: str, read_only: bool) -> None:
    (pod,) = workers(None, *(f"workerPools.default.modelCache.{value}" for value in cache)).values()
    (container,) = pod["containers"]
    assert environment(container)["TORCHINDUCTOR_CACHE_DIR"] == compiled
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts["/models"] is read_only
    assert mounts["/tmp"] is False


@pytest.mark.parametrize("name", SETS)
def test_settings_are_such(name: str | None) -> None:
    known = {f"BLIP_{field.upper()}" for field in Settings.model_fields}
    for who, pod in pods(render(name)):
        for container in pod["containers"]:
            ours = {variable for variable in environment(container) if variable.startswith("BLIP_")}
            assert ours <= known, who


@pytest.mark.parametrize("name", SETS)
def test_processes_take_the_settings_they_are_given(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, pod in pods(render(name)):
        with monkeypatch.context() as patched:
            given = environment(pod["containers"][0])
            for variable, value in given.items():
                patched.setenv(variable, value if isinstance(value, str) else "redis://from-a-secret")
            settings = load_settings()  # a UsageError would name the variable
            if "BLIP_MODELS" in given:
                assert ",".join(settings.models) == given["BLIP_MODELS"]


@pytest.mark.parametrize("name", SETS)
def test_secrets_are_never_in_plain_sight(name: str | None) -> None:
    documents = render(name)
    for who, pod in pods(documents):
        for container in pod["containers"]:
            for variable, value in environment(container).items():
                if any(word in variable for word in ("TOKEN", "SECRET", "PASSWORD", "AUTH", "KEY", "REDIS_URL")):
                    assert isinstance(value, dict), (who, variable)
                    assert set(value) == {"secretKeyRef"}, (who, variable)
                    assert "optional" not in value["secretKeyRef"], (who, variable)
    made = {value for secret in of_kind(documents, "Secret") for value in secret["data"].values()}
    shown = json.dumps([document for document in documents if document["kind"] != "Secret"])
    assert not [value for value in made if value in shown]


def test_no_secret_is_made_where_all_are_named() -> None:
    assert not of_kind(render("production"), "Secret")


def test_made_secrets_are_long_and_new_each_time() -> None:
    first, second = ({doc["metadata"]["name"]: doc["data"] for doc in of_kind(render(), "Secret")} for _ in range(2))
    assert first.keys() == second.keys() == {"rel-blip-batch-api", "rel-blip-batch-redis"}
    assert first["rel-blip-batch-api"]["token"] != second["rel-blip-batch-api"]["token"]
    assert len(first["rel-blip-batch-api"]["token"]) >= 64
    assert set(first["rel-blip-batch-redis"]) == {"password", "url"}


def test_the_orchestrator_serves_with_a_token_and_knows_the_largest_pool() -> None:
    documents = render("multi-model")
    pod = pod_spec(named(documents, "Deployment", "rel-blip-batch-orchestrator"))
    assert pod is not None
    settings = environment(pod["containers"][0])
    assert settings["BLIP_API_TOKEN"] == {"secretKeyRef": {"name": "rel-blip-batch-api", "key": "token"}}
    assert settings["BLIP_MAX_WORKERS"] == "16"
    service = named(documents, "Service", "rel-blip-batch-orchestrator")
    assert service["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": "http"}]
    assert settings["BLIP_API_PORT"] == "8080"
