"""The chart: who may talk to whom."""

import ipaddress
import json
from typing import Any

import pytest
from chart import VALUE_SETS, of_kind, pod_spec, render

SETS = [None, *VALUE_SETS]


def policies(name: str | None = None, *sets: str) -> dict[str, dict[str, Any]]:
    found = of_kind(render(name, *sets), "NetworkPolicy")
    return {document["metadata"]["name"].removeprefix("rel-blip-batch-"): document["spec"] for document in found}


@pytest.mark.parametrize("name", SETS)
def test_nothing_is_open_by_default(name: str | None) -> None:
    found = policies(name)
    everyone = found.pop("default-deny")
    assert everyone["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & everyone.keys()
    for document in filter(pod_spec, render(name)):
        labels = (document["spec"].get("template") or document)["metadata"]["labels"]
        assert everyone["podSelector"]["matchLabels"].items() <= labels.items()
    for who, spec in found.items():
        assert spec["podSelector"]["matchLabels"].items() >= everyone["podSelector"]["matchLabels"].items(), who
        assert all(rule.get("from") for rule in spec.get("ingress", ())), who
        assert all(rule.get("ports") for rule in spec.get("egress", ())), who


def test_the_ways_that_are_needed_are_open() -> None:
    found = policies("production")
    sources = json.dumps(found["orchestrator"]["ingress"])
    for namespace in ("keda", "monitoring", "data-team"):
        assert f'"kubernetes.io/metadata.name": "{namespace}"' in sources
    assert [rule["ports"] for rule in found["workers"]["ingress"]] == [[{"protocol": "TCP", "port": "metrics"}]]
    assert found["workers"]["egress"] == found["orchestrator"]["egress"]
    names, internet, redis = found["workers"]["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert internet["to"] == [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}},
        {"ipBlock": {"cidr": "::/0", "except": ["fd00:ec2::/32"]}},
    ]
    assert internet["ports"] == [{"protocol": "TCP", "port": 443}]
    assert redis == {"ports": [{"protocol": "TCP", "port": 6380}], "to": [{"ipBlock": {"cidr": "10.20.0.0/16"}}]}


def internet(*sets: str) -> dict[str, Any]:
    """The rule for what is outside of the cluster."""
    _, rule, *_ = policies(None, *sets)["workers"]["egress"]
    return dict(rule)


@pytest.mark.parametrize(
    ("urls", "ports"),
    [
        ("s3.endpointUrl=http://minio.storage:9000", [443, 9000]),
        ("s3.endpointUrl=https://minio.storage:9000/path,hub.endpoint=http://mirror", [443, 9000, 80]),
        ("s3.endpointUrl=https://minio.storage,hub.endpoint=https://mirror:443/x:7", [443]),
        ("s3.endpointUrl=http://[fd12::7]:9000,networkPolicy.internetPorts={8443}", [8443, 9000]),
        ("s3.endpointUrl=http://user@[fd12::7]", [443, 80]),
    ],
)
def test_the_ports_of_urls_that_are_given_are_open(urls: str, ports: list[int]) -> None:
    assert internet(urls)["ports"] == [{"protocol": "TCP", "port": port} for port in ports]


def test_each_kind_of_address_has_its_own_exceptions() -> None:
    for peer in internet("networkPolicy.exceptCidrs={169.254.0.0/16,fe80::/10,10.0.0.0/8}")["to"]:
        block = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        but = [ipaddress.ip_network(cidr) for cidr in peer["ipBlock"]["except"]]
        assert len(but) == (2 if block.version == 4 else 1)
        assert all(cidr.version == block.version for cidr in but)
    assert all("except" not in peer["ipBlock"] for peer in internet("networkPolicy.exceptCidrs=null")["to"])


def test_metrics_can_be_read_without_the_operator() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "watch"}}}
    value = "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=watch"
    found = policies(None, value)
    assert found["workers"]["ingress"] == [{"from": [peer], "ports": [{"protocol": "TCP", "port": "metrics"}]}]
    assert peer in found["orchestrator"]["ingress"][0]["from"]
    assert len(policies(None, value, "monitoring.enabled=true")["workers"]["ingress"][0]["from"]) == 2
    assert "ingress" not in policies()["workers"]


def test_redis_answers_orchestrators_and_workers_only() -> None:
    redis = policies()["redis"]
    assert "egress" not in redis
    (rule,) = redis["ingress"]
    peers = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"]]
    assert peers == ["orchestrator", "worker"]
