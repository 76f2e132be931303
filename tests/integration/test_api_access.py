"""Who may use the HTTP API, and for what: tokens, hosts, local files, the size and form of bodies."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api import TOKEN, body, http, problem, serving
from harness import advance
from mini_worker import MiniWorker
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.api.guard import MAX_BODY
from orchestrator.api.server import ApiServer
from orchestrator.control import Controller
from orchestrator.errors import JobError, UsageError
from orchestrator.settings import Settings
from workers.openjob import OpenJob


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the API may read and write."""
    (tmp_path / "allowed").mkdir()
    return tmp_path / "allowed"


@pytest.fixture
def url(settings: Settings, folder: Path) -> Iterator[str]:
    with serving(settings, allowed_folders=(str(folder),)) as url:
        yield url


@pytest.fixture
def api(url: str) -> Iterator[httpx.Client]:
    with http(url) as client:
        yield client


@pytest.mark.parametrize(
    "place",
    ["/etc/passwd", "/etc", "/no/such/thing", "rows.jsonl", "../x", "~/x", "{0}/../x", "{0}x", "{0}/no/../../x"],
)
def test_no_file_outside_of_the_allowed_folders(api: httpx.Client, folder: Path, place: str) -> None:
    """Nor is it told whether there is such a file."""
    place = place.format(folder)
    for name in ("manifest", "output"):
        answer = api.post("/v1/jobs", json={**body(folder), name: place})
        problem(answer, 422, "invalid", "s3://")
        assert "exist" not in answer.text
    if place.startswith(("/", ".", "~")):
        problem(api.post("/v1/jobs", json={**body(folder), "model": place}), 422, "invalid", "s3://")


def test_a_link_out_of_the_allowed_folders_is_followed_before_it_is_judged(api: httpx.Client, folder: Path) -> None:
    (folder / "link").symlink_to("/etc")
    problem(api.post("/v1/jobs", json={**body(folder), "manifest": str(folder / "link/passwd")}), 422, "invalid")


@pytest.mark.parametrize(
    "model", ["no{0}", "a/b{0}", "a://{0}", "a/b@{0}", "demo{0}", "{1}{0}", "{1}/no{0}", "{1}/link{0}", "./{0}"]
)
def test_no_model_leads_out_of_the_allowed_folders(api: httpx.Client, folder: Path, model: str) -> None:
    """Whatever comes before `..`, and in the same words whether there is such a directory."""
    (folder / "link").symlink_to(folder.parent)
    (folder.parent / "secret").mkdir()
    up = "/.." * 30 + str(folder.parent)
    for task, pair in (("caption", "{0}"), ("caption", "demo+{0}"), ("capfilt", "demo+{0}"), ("capfilt", "{0}+demo")):
        said = set()
        for name in ("secret", "no-such"):
            given = pair.format(model.format(f"{up}/{name}", folder))
            answer = api.post("/v1/jobs", json={**body(folder), "task": task, "model": given})
            problem(answer, 422, "invalid")
            said.add(answer.json()["detail"].replace(name, "NAME"))
        assert len(said) == 1


def test_a_link_beside_the_allowed_folders_leads_nowhere(api: httpx.Client, folder: Path, tmp_path: Path) -> None:
    """`…/link/../x` is below the allowed folder where the link is followed first, and outside where `..` is."""
    (folder / "sub").mkdir()
    (tmp_path / "link").symlink_to(folder / "sub")
    for name in ("manifest", "output", "model"):
        place = str(tmp_path / "link/../rows.jsonl")
        problem(api.post("/v1/jobs", json={**body(folder), name: place}), 422, "invalid", "no .. in it")


def test_models_in_the_allowed_folders_and_of_the_hub(api: httpx.Client, folder: Path) -> None:
    (folder / "own+one").mkdir()
    for number, model in enumerate((f"{folder}/own+one", "o/m", "o/m@refs/pr/1", "demo")):
        answer = api.post("/v1/jobs", json={**body(folder, output=f"{folder}/{number}"), "model": model})
        assert (answer.status_code, answer.json()["model"]) == (201, model)
    answer = api.post("/v1/jobs", json={**body(folder), "model": f"{folder}+o/m", "task": "capfilt"})
    assert (answer.status_code, answer.json()["model"]) == (201, f"{folder}+o/m")


def test_a_hub_name_is_no_directory_beside_the_orchestrator_or_a_worker(
    api: httpx.Client, controller: Controller, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is the same whether it is there, and no worker takes it for the hub's."""
    (folder.parent / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    answer = api.post("/v1/jobs", json={**body(folder), "model": "owner/name"})
    assert (answer.status_code, answer.json()["model"]) == (201, "owner/name")
    worker = MiniWorker(controller.settings)
    advance(controller, answer.json()["id"], lambda state: state.status == "in_progress")
    hint = worker.take()
    assert hint is not None
    with pytest.raises(JobError, match="owner/name hides the hub's owner/name"):
        OpenJob.of(controller.ledger, hint, controller.settings)
    monkeypatch.chdir(folder)
    assert OpenJob.of(controller.ledger, hint, controller.settings).spec.model == "owner/name"


def test_without_allowed_folders_there_is_only_s3(settings: Settings, folder: Path) -> None:
    with serving(settings) as url, http(url) as api:
        problem(api.post("/v1/jobs", json=body(folder)), 422, "invalid", "BLIP_ALLOWED_FOLDERS")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"task": NaN}', b"[" * 100_000, b'{"manifest": "\\ud800"}'],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_a_body_that_is_none(api: httpx.Client, content: bytes) -> None:
    answer = api.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    problem(answer, answer.status_code, answer.json()["code"])
    assert answer.status_code in {400, 422}


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": "s3://b/\ud800"},
        {"output": "s3://b/\udcff"},
        {"columns": {"id": "\ud800"}},
        {"manifest": "/x\ud800"},
        {"model": "/x\ud800"},
    ],
)
def test_half_a_character_is_no_text(api: httpx.Client, folder: Path, change: dict[str, Any]) -> None:
    text = json.dumps({**body(folder), **change})
    answer = api.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"})
    problem(answer, 422, "invalid", "is not text in UTF-8")


def test_infinity_is_no_number(api: httpx.Client, folder: Path) -> None:
    text = json.dumps({**body(folder), "options": {"length_penalty": float("nan")}})
    answer = api.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"})
    problem(answer, 422, "invalid", "option 'length_penalty' must be a finite number")


def test_large_bodies_are_refused(api: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 65536 + 2):
            yield b"x" * 65536

    for content in (b"x" * (MAX_BODY + 1), pieces()):  # with a length, and in chunks without
        answer = api.post("/v1/jobs", content=content)
        problem(answer, 413, "too_large", str(MAX_BODY))
        assert answer.headers["connection"] == "close"


ROUTES = (
    ("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/jobs/j"), ("POST", "/v1/jobs/j/cancel"),
    ("POST", "/v1/jobs/j/pause"), ("POST", "/v1/jobs/j/resume"), ("POST", "/v1/jobs/j/retry"),
    ("GET", "/v1/jobs/j/errors"), ("GET", "/v1/jobs/j/events"), ("GET", "/v1/backlog"), ("GET", "/v1/speed"),
    ("GET", "/v1/nothing"),
)  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_the_token(url: str, method: str, path: str) -> None:
    with http(url, None) as api:
        for header in (
            None,
            "",
            "Bearer",
            "Bearer wrong",
            f"Basic {TOKEN}",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
        ):
            answer = api.request(method, path, headers={} if header is None else {"Authorization": header})
            problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")


def test_the_probes_and_the_document_are_open(url: str) -> None:
    with http(url, None) as api:
        assert api.get("/healthz").json() == {"status": "ok"}
        assert api.get("/readyz").json() == {"status": "ok"}
        document = api.get("/openapi.json").json()
        assert {(method.upper(), path) for path, item in document["paths"].items() for method in item} == {
            *((method, path.replace("/j/", "/{job}/")) for method, path in ROUTES if path[-2:] not in {"/j", "ng"}),
            ("GET", "/v1/jobs/{job}"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"),
        }  # fmt: skip
        validate(document)
        assert "blip_backlog_rows" in {
            family.name for family in text_string_to_metric_families(api.get("/metrics").text)
        }
        problem(api.get("/docs"), 404, "not_found")
        problem(api.delete("/healthz"), 405, "method_not_allowed")


def test_answers_do_not_wait_for_acknowledgements(url: str) -> None:
    """40 ms each on one connection, if the accepted sockets lacked TCP_NODELAY."""
    with http(url) as api:
        assert min(api.get("/healthz").elapsed.total_seconds() for _ in range(20)) < 0.03


def test_without_a_token_only_this_machine_is_answered(settings: Settings) -> None:
    with serving(settings, api_token="") as url, http(url, None) as api:
        assert api.get("/v1/jobs").status_code == 200
        problem(api.get("/v1/jobs", headers={"Origin": "http://evil.example"}), 403, "forbidden")
        problem(api.get("/v1/jobs", headers={"Host": "evil.example"}), 403, "forbidden")  # a name made to mean us
    with serving(settings, api_token="none") as url, http(url, None) as api:
        assert api.get("/v1/jobs", headers={"Host": "blip.example"}).status_code == 200


def test_an_open_api_must_be_meant(settings: Settings) -> None:
    def start(**changes: object) -> None:
        ApiServer(settings.model_copy(update={"api_port": 0, **changes}), lambda: None).close()

    with pytest.raises(UsageError, match="BLIP_API_TOKEN=none"):
        start(api_host="0.0.0.0")
    start(api_host="0.0.0.0", api_token="none")
    start(api_host="0.0.0.0", api_token="secret")
    with pytest.raises(UsageError, match="printable") as refused:
        start(api_token="sécret")
    assert "sécret" not in str(refused.value)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="BLIP_API_PORT"):
            start(api_port=taken.getsockname()[1])
