"""The API against its own OpenAPI document: whatever is sent, no answer is a bug, and each is as the document says."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from api import TOKEN, at_work, serving
from harness import advance, ended
from mini_worker import MiniWorker
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance, unsupported_method

from orchestrator.api.app import create_app
from orchestrator.control import Controller
from orchestrator.jobs import make_spec, submit
from orchestrator.ledger import Ledger
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store

EXAMPLES = 60  # of each operation, besides those that cover its parameters one by one
MANIFEST, OUTPUT = "s3://blip/in/rows.jsonl", "s3://blip/out"
SPEC = make_spec(MANIFEST, "caption", OUTPUT, model="demo")  # its id is always the same


def document() -> dict[str, Any]:
    """Nothing is connected for it."""
    settings = load_settings()
    ledger = Ledger.connect(settings)
    found: dict[str, Any] = create_app(ledger, settings).openapi()
    ledger.close()
    return found


#: What a document cannot say: which submissions make sense (422 if not); that any text may be the name of a model.
EXCLUDED = {"POST /v1/jobs": [positive_data_acceptance], "GET /v1/backlog": [negative_data_rejection]}

schema = schemathesis.openapi.from_dict(
    document(),
    config=SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "generation": {"mode": "all", "max-examples": EXAMPLES, "deterministic": True, "database": "none"},
            "suppress-health-check": ["all"],
            # So that much of what is sent is of a job that is there, and of a manifest that can be read.
            "dictionaries": {
                "jobs": {"values": [SPEC.id, "job-0"]},
                "manifests": {"values": [MANIFEST, "s3://blip/in/", "/etc/passwd", "s3://absent/rows.csv"]},
                "outputs": {"values": [OUTPUT, "s3://blip/else", "s3://absent/out", "/tmp"]},
                "tasks": {"values": ["caption", "vqa", "paint"]},
                "models": {"values": ["demo", "owner/name"]},
            },
            "parameters": {
                "path.job": {"dictionary": "jobs", "probability": 0.7},
                "query.after": {"dictionary": "jobs", "probability": 0.5},
                "body.manifest": {"dictionary": "manifests", "probability": 0.7},
                "body.output": {"dictionary": "outputs", "probability": 0.7},
                "body.model": {"dictionary": "models", "probability": 0.7},
                "body.task": {"dictionary": "tasks", "probability": 0.5},
            },
        }
    ),
)


@pytest.fixture
def url(settings: Settings, controller: Controller, s3_server: object) -> Iterator[str]:
    """An API with a job that has ended, and a cluster beside it that works on what is submitted."""
    rows = "".join(json.dumps({"image": f"s3://blip/in/{'bad' if n % 3 else 'img'}-{n}.png"}) + "\n" for n in range(30))
    open_store("s3://blip/in").put("rows.jsonl", rows.encode())
    submit(controller.ledger, SPEC, settings)
    worker = MiniWorker(settings)
    advance(controller, SPEC.id, ended, worker)
    with serving(settings, storage_retry_seconds=1.0) as url, at_work(controller, worker):
        yield url


# The services run in threads of this process and draw the jitter of their retries from `random`, which Hypothesis
# takes for its strategies' doing.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@schema.parametrize()
def test_no_input_is_a_bug_and_every_answer_is_as_documented(case: schemathesis.Case, url: str) -> None:
    answer = case.call(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
    if answer.text == "Invalid HTTP request received.":
        return  # a header that HTTP does not allow: uvicorn's own answer, before any app
    case.validate_response(answer, excluded_checks=[unsupported_method, *EXCLUDED.get(case.operation.label, ())])
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == ["application/problem+json"]
