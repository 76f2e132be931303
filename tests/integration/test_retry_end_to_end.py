"""A retry through real services: which images are fetched again is counted at the S3 server."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from PIL import Image
from servers import MotoServer, RedisServer
from system import Cluster, colour

from orchestrator import lifecycle
from orchestrator.export import export
from orchestrator.s3 import s3_client
from orchestrator.storage import open_store
from orchestrator.verify import verify

ROWS, BAD = 40, range(3, 40, 5)  # eight images are not there


@pytest.fixture
def proxy(s3_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    s3_client.cache_clear()
    yield proxy
    proxy.close()


@pytest.fixture
def cluster(redis_server: RedisServer, proxy: FaultyProxy, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    cluster.start_orchestrator()
    cluster.start_worker()
    yield cluster
    cluster.close()


def put(number: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (number, 0, 7)).save(file, "PNG")
    open_store("s3://blip/img").put(f"{number:02}.png", file.getvalue())


def fetched(proxy: FaultyProxy) -> Counter[int]:
    """Images by how often they were asked for, since the last time."""
    paths = [path for method, path in proxy.requests if method == "GET" and path.startswith("/blip/img/")]
    proxy.requests.clear()
    return Counter(int(path[-6:-4]) for path in paths)


def test_only_what_failed_is_fetched_again(cluster: Cluster, proxy: FaultyProxy, tmp_path: Path) -> None:
    for number in range(ROWS):
        if number not in BAD:
            put(number)
    rows = "".join(json.dumps({"image": f"s3://blip/img/{n:02}.png", "id": n}) + "\n" for n in range(ROWS))
    open_store("s3://blip").put("rows.jsonl", rows.encode())
    job = cluster.submit("s3://blip/rows.jsonl", "s3://blip/out").id
    assert cluster.until_ended(job).failed == len(BAD)
    assert fetched(proxy) == dict.fromkeys(range(ROWS), 1)

    mended = list(BAD)[::2]
    for number in mended:
        put(number)
    assert lifecycle.retry(cluster.ledger, cluster.settings, job).rows == len(BAD)
    state = cluster.until(job, lambda state: state.ended and state.round == 1)
    assert (state.status, state.completed, state.failed) == ("completed", ROWS - len(BAD) + len(mended), 4)
    assert fetched(proxy) == dict.fromkeys(BAD, 1)
    assert verify("s3://blip/out", cluster.settings).ok

    export("s3://blip/out", str(tmp_path / "all.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == list(range(ROWS))
    for number, record in enumerate(records):
        if number in BAD and number not in mended:
            assert record["error"]["code"] == "image_not_found"
        else:
            assert record["result"]["caption"] == colour(number)
