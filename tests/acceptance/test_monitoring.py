"""A real Prometheus scrapes a real run: every panel of the dashboards has data, and a stall raises its alert."""

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from monitoring import Prometheus, Sample, promtool
from servers import RedisServer, free_port
from system import Cluster, children, stopped, write_images, write_rows

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "blip-batch"
RULES = yaml.safe_load((CHART / "rules" / "blip-batch.yaml").read_text())
ROWS = 8000  # so many that the job outlasts the tests; each takes 20 ms
#: A GPU for the worker: NVML alone knows its numbers, and needs a driver.
NVML = """
from types import SimpleNamespace

class NVMLError(Exception): pass

def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return f"GPU {handle} of a test"
def nvmlDeviceGetUtilizationRates(handle): return SimpleNamespace(gpu=87)
def nvmlDeviceGetMemoryInfo(handle): return SimpleNamespace(used=6 << 30)
"""


@dataclass
class Run:
    """A system at work, and who watches it."""

    cluster: Cluster
    prometheus: Prometheus
    api: int  # ports
    worker: int
    job: str

    def metrics(self, port: int) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return bytes(answer.read())


def quick(rules: dict[str, Any]) -> dict[str, Any]:
    """The same rules for a test's patience: seconds for the minutes that the stall is about."""
    text = yaml.safe_dump(rules)
    for minutes, seconds in (("> 900", "> 6"), ("> 600", "> 6"), ("for: 5m", "for: 2s"), ("for: 2m", "for: 2s")):
        assert minutes in text
        text = text.replace(minutes, seconds)
    return dict(yaml.safe_load(text))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A job of slow rows, some of which fail, on a real orchestrator and worker, with the dry engine."""
    folder = tmp_path_factory.mktemp("run")
    redis = RedisServer(folder)
    redis.start()
    api, worker = free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP_REDIS_URL", redis.url)
        cluster = Cluster(folder)
    prometheus = Prometheus(folder, {"orchestrator": [api], "workers": [worker]}, quick(RULES))
    try:
        cluster.start("orchestrator", BLIP_API_PORT=str(api), BLIP_PRICE_PER_WORKER_HOUR="2.5")
        cluster.start_worker(
            BLIP_METRICS_PORT=str(worker), BLIP_LEASE_SECONDS="8", BLIP_ENGINE_TIMEOUT_SECONDS="60",
            PYTHONPATH=os.pathsep.join([str(with_gpu(folder)), cluster.environment["PYTHONPATH"]]),
        )  # fmt: skip
        prometheus.start()
        write_images(folder, 50)
        rows = [
            {"image": f"{n % 50}.png" if n % 7 else f"absent-{n}.png", "prompt": f"order:slow {n}"} for n in range(ROWS)
        ]
        spec = cluster.submit(write_rows(folder / "rows.jsonl", rows), folder / "out", chunk_rows=20)  # type: ignore[arg-type]
        yield Run(cluster, prometheus, api, worker, spec.id)
    finally:
        prometheus.kill()
        cluster.close()
        redis.kill()


def with_gpu(folder: Path) -> Path:
    """Where a process of this path finds an NVML that has a GPU."""
    (folder / "nvml").mkdir()
    (folder / "nvml" / "pynvml.py").write_text(NVML)
    return folder / "nvml"


def dashboards() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.stem}: {panel['title']}", panel)
        for path in sorted((CHART / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
    ]


def is_number(sample: Sample) -> bool:
    return sample["value"][1] not in {"NaN", "+Inf", "-Inf"}


def substituted(expression: str) -> str:
    """As Grafana would ask, with everything selected."""
    found = expression.replace("$namespace", ".*").replace("$__rate_interval", "6s")
    assert "$" not in found
    return found


@pytest.mark.parametrize("port", ["api", "worker"])
def test_promtool_finds_nothing_to_say_about_an_endpoint(run: Run, port: str) -> None:
    run.prometheus.until("blip_chunk_seconds_count > 0")
    found = promtool("check", "metrics", stdin=run.metrics(getattr(run, port)))
    assert (found.returncode, found.stdout + found.stderr) == (0, b"")


def test_prometheus_scrapes_both_without_a_complaint(run: Run) -> None:
    run.prometheus.until("up == 1", holds=lambda found: len(found) == 2)
    targets = run.prometheus.ask("targets")["activeTargets"]
    assert {target["health"] for target in targets} == {"up"}
    assert {target["lastError"] for target in targets} == {""}


@pytest.mark.parametrize(("title", "panel"), dashboards(), ids=[title for title, _ in dashboards()])
def test_every_panel_has_data(run: Run, title: str, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = substituted(target["expr"])
        found = run.prometheus.until(expression, holds=lambda found: bool(found) and all(map(is_number, found)))
        names = re.findall(r"{{(\w+)}}", target["legendFormat"])
        assert all(set(names) <= sample["metric"].keys() for sample in found), "the legend names absent labels"


QUESTIONS = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", (ROOT / "docs" / "monitoring.md").read_text(), re.MULTILINE))


def test_a_gpu_is_told_as_nvml_has_it(run: Run) -> None:
    (used,) = run.prometheus.until("blip_gpu_memory_used_bytes")
    assert float(used["value"][1]) == 6 << 30
    (share,) = run.prometheus.until("blip_gpu_utilization_ratio")
    assert float(share["value"][1]) == 0.87
    (info,) = run.prometheus.until("blip_worker_info")
    assert info["metric"]["gpu"] == "GPU 0 of a test"


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_questions_of_the_documentation_have_answers(run: Run, question: str) -> None:
    expression = re.sub(r"\[\d+m\]", "[6s]", QUESTIONS[question])
    run.prometheus.until(expression, holds=lambda found: bool(found) and all(map(is_number, found)))


def test_the_configuration_of_the_documentation_is_right(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.+?)```", (ROOT / "docs" / "monitoring.md").read_text(), re.DOTALL)
    (tmp_path / "prometheus.yml").write_text(block.replace("helm/", f"{ROOT}/helm/"))
    checked = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_recording_rules_have_data(run: Run) -> None:
    for rule in (rule for group in RULES["groups"] for rule in group["rules"] if "record" in rule):
        run.prometheus.until(rule["record"])


def test_the_numbers_are_those_of_the_ledger(run: Run) -> None:
    run.prometheus.until("blip_rows_done_total > 100")
    done = float(run.prometheus.query("max(blip_rows_done_total)")[0]["value"][1])
    progress = run.cluster.ledger.progress(run.job)
    assert progress is not None
    assert done <= progress.completed + progress.failed <= done + 1000  # a scrape and a cache behind
    left = float(run.prometheus.query("max(blip_backlog_rows) + max(blip_rows_done_total)")[0]["value"][1])
    assert left == pytest.approx(ROWS, abs=100)  # chunks that end between two reads of Redis


def test_a_stall_raises_its_alerts_and_its_end_lowers_them(run: Run) -> None:
    """The worker is stopped as a whole: it cannot even answer a scrape. What the orchestrator sees must do."""
    run.prometheus.until("blip_live_workers > 0 and blip_rows_done_total > 0")
    assert run.prometheus.query('ALERTS{alertname="BlipJobStalled", alertstate="firing"}') == []
    with stopped(psutil.Process(run.cluster.processes[1].pid)):
        (alert,) = run.prometheus.until('ALERTS{alertname="BlipJobStalled", alertstate="firing"}')
        assert alert["metric"]["severity"] == "critical"
        assert run.prometheus.query('ALERTS{alertname="BlipOrchestratorAbsent", alertstate="firing"}') == []
    run.prometheus.until('ALERTS{alertname="BlipJobStalled"}', holds=lambda found: not found)


def test_an_engine_that_hangs_is_seen_at_its_worker(run: Run) -> None:
    run.prometheus.until("blip_worker_chunks > 0")
    (engine,) = children(run.cluster.processes[1].pid, "engine")
    with stopped(engine):
        (alert,) = run.prometheus.until('ALERTS{alertname="BlipWorkerNotProgressing", alertstate="firing"}')
        assert alert["metric"]["instance"] == f"127.0.0.1:{run.worker}"
