"""The chart: who scales whom, what is watched, and which values are refused."""

import json
import os
import re
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from chart import CHART, VALUE_SETS, environment, helm, named, of_kind, pod_spec, pods, render, texts
from servers import redis_binary, redis_settings

from orchestrator.settings import Settings

SETS = [None, *VALUE_SETS]


# Scaling


def scaled(name: str | None = None, *sets: str) -> dict[str, dict[str, Any]]:
    """The specs of ScaledObjects, by the name of their pool."""
    found = of_kind(render(name, *sets), "ScaledObject")
    return {document["metadata"]["labels"]["blip-batch/pool"]: document["spec"] for document in found}


def test_a_pool_follows_desired_workers_from_zero() -> None:
    (spec,) = scaled("production").values()
    assert spec["scaleTargetRef"] == {"name": "rel-blip-batch-worker-default"}
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 40)
    assert spec["fallback"] == {"failureThreshold": 4, "replicas": 1, "behavior": "currentReplicasIfHigher"}
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "metrics-api"
    assert trigger["metricType"] == "AverageValue"  # what a fallback needs; and value / 1 is the number of workers
    assert trigger["metadata"] == {
        "url": "http://rel-blip-batch-orchestrator.ns.svc:8080/v1/backlog", "valueLocation": "desired_workers",
        "targetValue": "1", "authMode": "bearer",
    }  # fmt: skip


def test_the_trigger_has_the_token_of_the_api() -> None:
    documents = render("production")
    (spec,) = scaled("production").values()
    trust = named(documents, "TriggerAuthentication", spec["triggers"][0]["authenticationRef"]["name"])
    assert trust["spec"]["secretTargetRef"] == [{"parameter": "token", "name": "blip-api", "key": "token"}]


def test_every_pool_asks_for_its_own_models_and_one_for_the_others() -> None:
    asked = {}
    for pool, spec in scaled("multi-model").items():
        url = urllib.parse.urlsplit(spec["triggers"][0]["metadata"]["url"])
        asked[pool] = urllib.parse.parse_qs(url.query)
    pair = "Salesforce/blip-image-captioning-base+Salesforce/blip-itm-base-coco"
    large = "Salesforce/blip-image-captioning-large"
    assert asked == {
        "captions": {"model": [large]}, "clean": {"model": [pair]}, "cpu": {"model": ["demo", "/models/own"]},
        "default": {"without_model": [large, pair, "demo+/models/own"]},
    }  # fmt: skip


def test_prometheus_is_the_other_trigger() -> None:
    (spec,) = scaled(
        None, "autoscaling.keda.trigger=prometheus", "autoscaling.keda.prometheus.serverAddress=http://p:9090",
        "workerPools.default.autoscaling.query=blip_backlog_rows{pool=\"a\"}",
    ).values()  # fmt: skip
    (trigger,) = spec["triggers"]
    assert trigger["metadata"] == {
        "serverAddress": "http://p:9090", "query": 'blip_backlog_rows{pool="a"}', "threshold": "1",
        "ignoreNullValues": "false",
    }  # fmt: skip
    assert "authenticationRef" not in trigger
    (other,) = scaled(
        None, "autoscaling.keda.trigger=prometheus", "autoscaling.keda.prometheus.serverAddress=http://p:9090"
    ).values()
    assert other["triggers"][0]["metadata"]["query"] == 'max(blip_desired_workers{namespace="ns"})'


def test_pools_do_not_share_a_query_of_prometheus() -> None:
    with pytest.raises(helm().HelmError, match=r"workerPools\.\w+\.autoscaling\.query: with several pools"):
        render(
            "multi-model", "autoscaling.keda.trigger=prometheus",
            "autoscaling.keda.prometheus.serverAddress=http://p:9090",
        )  # fmt: skip


SHARED = {
    "workerPools.spot.precision=fp16": "workerPools.default and workerPools.spot both serve any model",
    "workerPools.a.models={x/y},workerPools.b.models={demo,x/y}": "workerPools.a and workerPools.b both serve x/y",
    "workerPools.a.models={x/y+x/z},workerPools.b.models={x/z}": "workerPools.a and workerPools.b both serve x/z",
}


@pytest.mark.parametrize("pools", SHARED)
def test_pools_for_the_same_jobs_are_refused_where_each_would_be_scaled_for_all(pools: str) -> None:
    with pytest.raises(helm().HelmError, match=re.escape(SHARED[pools]) + r".* make one pool of them"):
        render(None, pools)
    for kind in ("none", "hpa"):  # there each pool has a number, or a load, of its own
        assert render(None, pools, f"autoscaling.kind={kind}")


def test_a_pool_may_name_a_model_twice_and_revisions_are_models_of_their_own() -> None:
    pools = scaled(None, "workerPools.a.models={x/y,x/y+x/z}", "workerPools.b.models={x/y@v2}")
    assert pools.keys() == {"default", "a", "b"}


def test_without_keda_an_hpa_keeps_at_least_one() -> None:
    documents = render(None, "autoscaling.kind=hpa", "workerPools.default.autoscaling.max=7")
    assert not of_kind(documents, "ScaledObject")
    (hpa,) = of_kind(documents, "HorizontalPodAutoscaler")
    assert (hpa["spec"]["minReplicas"], hpa["spec"]["maxReplicas"]) == (1, 7)
    assert hpa["spec"]["scaleTargetRef"]["name"] == "rel-blip-batch-worker-default"


@pytest.mark.parametrize("kind", ["keda", "hpa", "none"])
def test_only_without_a_scaler_the_chart_sets_the_number_of_workers(kind: str) -> None:
    documents = render(None, f"autoscaling.kind={kind}", "workerPools.default.replicas=3")
    replicas = named(documents, "Deployment", "rel-blip-batch-worker-default")["spec"].get("replicas")
    assert replicas == (3 if kind == "none" else None)  # an upgrade must not undo what the scaler did


# Who belongs to whom


@pytest.mark.parametrize("name", SETS)
def test_selectors_find_their_pods_and_no_others(name: str | None) -> None:
    documents = render(name)
    labels = {
        document["metadata"]["name"]: (document["spec"].get("template") or document)["metadata"]["labels"]
        for document in documents if pod_spec(document)
    }  # fmt: skip
    for document in documents:
        if document["kind"] in {"Deployment", "StatefulSet", "PodDisruptionBudget", "Service"}:
            selector = document["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            found = [who for who, has in labels.items() if selector.items() <= has.items()]
            assert found == [document["metadata"]["name"]], document["kind"]


@pytest.mark.parametrize("name", SETS)
def test_names_are_short_enough_and_references_lead_somewhere(name: str | None) -> None:
    documents = render(name, "fullnameOverride=a-name-that-is-as-long-as-can-be-for-a-release")
    known = {(document["kind"], document["metadata"]["name"]) for document in documents}
    assert len(known) == len(documents)
    assert all(len(who) <= 63 for _, who in known)
    for _, pod in pods(documents):
        account = pod.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in known
    for spec in scaled(name, "fullnameOverride=a-name-that-is-as-long-as-can-be-for-a-release").values():
        assert ("Deployment", spec["scaleTargetRef"]["name"]) in known


@pytest.mark.parametrize("name", SETS)
def test_a_pod_that_does_not_work_holds_no_node_back(name: str | None) -> None:
    for budget in of_kind(render(name), "PodDisruptionBudget"):
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_what_stays_the_same_restarts_no_worker() -> None:
    pod = named(render(), "Deployment", "rel-blip-batch-worker-default")["spec"]["template"]["metadata"]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & pod["labels"].keys()


def test_redis_keeps_what_it_is_told() -> None:
    documents = render()
    configuration = named(documents, "ConfigMap", "rel-blip-batch-redis")["data"]["redis.conf"]
    assert {"appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction"} <= set(configuration.splitlines())
    redis = named(documents, "StatefulSet", "rel-blip-batch-redis")
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    password = {"name": "rel-blip-batch-redis", "key": "password"}
    assert environment(container) == {"REDISCLI_AUTH": {"secretKeyRef": password}}
    assert redis["spec"]["volumeClaimTemplates"][0]["spec"]["resources"] == {"requests": {"storage": "8Gi"}}


def test_a_real_redis_takes_the_configuration_and_the_signal_to_end(tmp_path: Path) -> None:
    documents = render()
    configuration = named(documents, "ConfigMap", "rel-blip-batch-redis")["data"]["redis.conf"]
    path, listening = tmp_path / "redis.conf", tmp_path / "socket"
    path.write_text(configuration.replace("/data", str(tmp_path)) + f"\nport 0\nunixsocket {listening}\n", "utf-8")
    (container,) = named(documents, "StatefulSet", "rel-blip-batch-redis")["spec"]["template"]["spec"]["containers"]
    command = [part.replace("/etc/redis/redis.conf", str(path)) for part in container["command"]]
    command[-1] = command[-1].replace("redis-server", redis_binary())
    with subprocess.Popen(command, env=os.environ | {"REDISCLI_AUTH": "a-b-c"}) as process:
        try:
            with pytest.raises(redis.AuthenticationError):
                redis_settings(listening, None)
            asked = redis_settings(listening, "a-b-c")
        finally:
            process.terminate()
        assert process.wait(10) == 0
    assert asked == {"maxmemory-policy": "noeviction", "appendonly": "yes", "maxmemory": str(640 << 20), "save": ""}


def test_an_external_redis_is_all_that_is_known_of_redis() -> None:
    documents = render("production")
    assert not [document for document in documents if document["metadata"]["name"].endswith("-redis")]
    for _, pod in pods(documents):
        found = environment(pod["containers"][0]).get("BLIP_REDIS_URL")
        assert found in (None, {"secretKeyRef": {"name": "blip-redis", "key": "url"}})  # None: the test's pod


# What is watched


def test_the_files_of_rules_and_dashboards_arrive_as_they_are() -> None:
    documents = render("production")
    rules = sorted((CHART / "rules").glob("*.yaml"))
    boards = sorted((CHART / "dashboards").glob("*.json"))
    assert rules
    assert boards
    for path in rules:
        document = named(documents, "PrometheusRule", f"rel-blip-batch-{path.stem}")
        assert document["spec"] == yaml.safe_load(path.read_text(encoding="utf-8"))
        assert document["metadata"]["labels"]["release"] == "prometheus"
    for path in boards:
        document = named(documents, "ConfigMap", f"rel-blip-batch-dashboard-{path.stem}")
        assert json.loads(document["data"][path.name]) == json.loads(path.read_text(encoding="utf-8"))
        assert document["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_links_of_alerts_lead_to_where_the_runbook_is_kept() -> None:
    page = "https://wiki.example.com/blip/runbook?v=1"
    (document,) = of_kind(render("production", f"monitoring.runbookUrl={page}"), "PrometheusRule")
    rules = [rule for group in document["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert [rule["annotations"]["runbook_url"] for rule in rules] == [
        f"{page}#{rule['alert'].lower()}" for rule in rules
    ]


def test_monitors_name_ports_that_pods_have() -> None:
    documents = render("production")
    monitor = named(documents, "PodMonitor", "rel-blip-batch-workers")
    worker = named(documents, "Deployment", "rel-blip-batch-worker-default")["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in [
        port["name"] for port in worker["spec"]["containers"][0]["ports"]
    ]
    monitor = named(documents, "ServiceMonitor", "rel-blip-batch-orchestrator")
    service = named(documents, "Service", "rel-blip-batch-orchestrator")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


def test_the_hook_of_helm_test_is_python_that_compiles() -> None:
    (pod,) = of_kind(render(), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    compile(container["args"][0], "test", "exec")


@pytest.mark.parametrize("name", SETS)
def test_the_notes_name_pools_and_secrets(name: str | None) -> None:
    notes = texts(name)["blip-batch/templates/NOTES.txt"]
    assert "default:" in notes
    assert ("get secret blip-api" if name == "production" else "get secret rel-blip-batch-api") in notes
    assert "<no value>" not in notes


# Values


WRONG = {
    "workerPools.default.gpus=1": "'/workerPools/default': additional properties 'gpus' not allowed",
    "workerPools.default.drainSeconds=soon": "'/workerPools/default/drainSeconds': got string, want integer",
    "workerPools.default.precision=fp8": "value must be one of 'auto', 'fp32', 'bf16', 'fp16', 'int8'",
    "workerPools.default.autoscaling.min=9": "workerPools.default.autoscaling: min 9 is above max 4",
    "workerPools.default.models={a b}": "'/workerPools/default/models/0': 'a b' does not match",
    "workerPools.Large.precision=fp16": "invalid propertyName 'Large'",
    "workerPools.default.resources.limits.memory=12GB": "'12GB' does not match",
    "workerPools.default=null": "'/workerPools': minProperties: got 0, want 1",
    "settings.BLIP_SLOT=9": "'/settings': additional properties 'BLIP_SLOT' not allowed",
    "settings.BLIP_REDIS_URL=redis://:secret@host": "additional properties 'BLIP_REDIS_URL' not allowed",
    "api.token=secret": "'/api': additional properties 'token' not allowed",
    "redis.password=secret": "'/redis': additional properties 'password' not allowed",
    "redis.enabled=false": "redis.enabled=false needs redis.existingSecret: a Secret whose key `url` is the URL",
    "image.worker.tag=latest": "image blip-batch/worker: `latest` is no version; name a tag or a digest",
    "autoscaling.kind=vpa": "'/autoscaling/kind': value must be one of 'keda', 'hpa', 'none'",
    "autoscaling.keda.trigger=prometheus": "autoscaling.keda.prometheus.serverAddress: the URL of Prometheus is needed",
    "monitoring.runbookUrl=docs": "'/monitoring/runbookUrl': 'docs' does not match",
    "networkPolicy.exceptCidrs={fd00}": "'/networkPolicy/exceptCidrs/0': 'fd00' does not match",
    "podSecurityContext.runAsUser=0": "'/podSecurityContext/runAsUser': minimum: got 0, want 1",
    "workers=3": "additional properties 'workers' not allowed",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_is_refused_with_its_name(wrong: str) -> None:
    with pytest.raises(helm().HelmError, match=re.escape(WRONG[wrong])):
        texts(None, wrong)


def test_the_schema_knows_every_setting_but_those_of_the_chart() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    listed = set(schema["definitions"]["settings"]["properties"])
    chart_decides = {
        "REDIS_URL", "API_HOST", "API_PORT", "API_TOKEN", "API_URL", "METRICS_HOST", "METRICS_PORT", "MAX_WORKERS",
        "MODELS", "PRECISION", "DEVICE", "DRAIN_SECONDS",
    }  # fmt: skip
    settings = {name.upper() for name in Settings.model_fields}
    assert chart_decides <= settings
    assert listed == {f"BLIP_{name}" for name in settings - chart_decides}, (
        "helm/blip-batch/values.schema.json: settings"
    )


def test_every_value_that_is_allowed_has_a_default() -> None:
    """Helm itself refuses defaults that the schema does not allow; this is the other direction."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    open_maps = {"settings", "resources", "global"}  # any or all of their keys may be left out
    assert not [path for path in _allowed(schema, schema, open_maps) if not _has(defaults, path)]


def _allowed(schema: dict[str, Any], root: dict[str, Any], leave: set[str]) -> Iterator[tuple[str, ...]]:
    if "$ref" in schema:
        schema = root["definitions"][schema["$ref"].rpartition("/")[2]]
    for key, value in schema.get("properties", {}).items():
        if key not in leave | {"supplementalGroups"}:
            yield (key,)
            yield from ((key, *rest) for rest in _allowed(value, root, leave))


def _has(tree: dict[str, Any], path: tuple[str, ...]) -> bool:
    for key in path:
        if key not in tree:
            return False
        tree = tree[key]
    return True
