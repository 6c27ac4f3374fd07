"""Metrics as text, judged by the parser of Prometheus' own Python library."""

import http.client
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fscache.api.exposition import exposition
from fscache.api.message import Request
from fscache.api.metricsserver import MetricsError, MetricsServer
from fscache.api.prometheus import CONTENT_TYPE, Family, Histogram, Kind, Sample, render
from fscache.api.routes import answer
from fscache.backend.base import BackendError, BackendMetrics
from fscache.lifecycle import State
from fscache.metrics import CacheMetrics
from fscache.node import Entry, NodeDaemon, NodeOptions
from fscache.tcpaddress import parse_address

AWKWARD = 'a "b" \\ c\nd, e="f" {}\t\xe9'


def parse(text):
    """Return families by name, and samples by name and labels."""
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert len(samples) == sum(len(family.samples) for family in families.values())
    return families, samples


def test_text_as_it_is_written():
    text = render(
        [
            Family("a_total", Kind.COUNTER, "Help\\ \n.", [Sample(3, {"x": 'q"', "y": "z"})]),
            Family("b", Kind.GAUGE, "None.", []),
            Family("c", Kind.GAUGE, "Plain.", [Sample(0.25)]),
        ]
    )
    assert text == (
        b"# HELP a_total Help\\\\ \\n.\n"
        b"# TYPE a_total counter\n"
        b'a_total{x="q\\"",y="z"} 3\n'
        b"# HELP c Plain.\n"
        b"# TYPE c gauge\n"
        b"c 0.25\n"
    )


@pytest.mark.parametrize("label", [AWKWARD, "", "\\", '\\"', "\\n", "x\r\n"])
def test_labels_come_back(label):
    families, samples = parse(render([Family("n", Kind.GAUGE, AWKWARD, [Sample(1, {"l": label})])]))
    assert samples == {("n", (("l", label),)): 1}
    # The library's parser strips nothing but joins lines: the help text comes back, too.
    assert families["n"].documentation == AWKWARD


def test_names_that_are_no_utf8():
    text = render([Family("n", Kind.GAUGE, "", [Sample(1, {"path": "x\udcff"})])])
    assert parse(text)[1] == {("n", (("path", "x\\udcff"),)): 1}


def test_histograms_are_cumulative():
    value = Histogram([0.5, 2], [4, 0, 3], 12.5)
    _, samples = parse(render([Family("h", Kind.HISTOGRAM, "", [Sample(value, {"i": "x"})])]))
    assert samples == {
        ("h_bucket", (("i", "x"), ("le", "0.5"))): 4,
        ("h_bucket", (("i", "x"), ("le", "2"))): 4,
        ("h_bucket", (("i", "x"), ("le", "+Inf"))): 7,
        ("h_sum", (("i", "x"),)): 12.5,
        ("h_count", (("i", "x"),)): 7,
    }


def image(kind):
    return SimpleNamespace(
        config=SimpleNamespace(id=AWKWARD),
        bootstrap=Path("/x/boot"),
        cache_metrics=CacheMetrics(Path("/cache"), 3),
        backend=SimpleNamespace(metrics=BackendMetrics(kind)),
    )


@pytest.fixture
def daemon(tmp_path):
    daemon = NodeDaemon(NodeOptions(tmp_path))
    for path, served in (("/", image("registry")), ("/a b", image("localfs")), ("/dir", None)):
        daemon._table[path] = Entry(path, 1000.5, served, None)
    return daemon


def test_every_counter_of_an_image(daemon):
    served = daemon.image("/")
    cache, metrics = served.cache_metrics, served.backend.metrics
    cache.add_file("f", 2)
    cache.request(wanted=3, missing=0)
    cache.request(wanted=3, missing=1)
    for _ in range(4):
        cache.request(wanted=3, missing=3)
    cache.chunk_fetched()
    cache.digest_failure()
    cache.buffer(77)
    cache.prefetch(time.time() - 2, 500)
    for length, seconds, failed in ((1023, 0.0002, False), (1024, 0.0003, False), (9, 9, True)):
        cache.reads.end(cache.reads.begin(0.0, 1), length, seconds, failed=failed)
    with metrics.measure(100):
        pass
    with pytest.raises(BackendError), metrics.measure(100):
        raise BackendError("no")
    _, samples = parse(exposition(daemon))

    def value(name, **labels):
        labels = {"mountpoint": "/", **labels}
        return samples[f"nydusd_{name}", tuple(sorted(labels.items()))]

    assert value("read_bytes_total") == 2047
    assert value("read_errors_total") == 1
    assert value("read_size_bytes_count") == 3
    assert value("read_size_bytes_sum") == 2056
    assert value("read_size_bytes_bucket", le="1023") == 2
    assert value("read_size_bytes_bucket", le="4095") == 3
    assert value("read_duration_seconds_bucket", le="0.0002") == 1
    assert value("read_duration_seconds_bucket", le="0.001") == 2
    assert value("read_duration_seconds_bucket", le="2.0") == 2
    assert value("read_duration_seconds_sum") == pytest.approx(9.0005)
    results = [value("cache_requests_total", result=word) for word in ("hit", "partial", "miss")]
    assert results == [1, 1, 4]
    assert value("cache_chunks_ready") == 3
    assert value("cache_complete") == 0
    assert value("cache_files") == 1
    assert value("chunks_fetched_total") == 1
    assert value("chunks_bad_total") == 1
    assert value("backend_buffered_bytes") == 77
    assert value("prefetch_workers") == 3
    assert value("prefetch_requests_total") == 1
    assert value("prefetch_bytes_total") == 500
    assert value("prefetch_duration_seconds_total") >= 2
    assert value("prefetch_end_timestamp_seconds") >= value("prefetch_begin_timestamp_seconds") + 2
    assert value("backend_requests_total", backend="registry") == 2
    assert value("backend_errors_total", backend="registry") == 1
    assert value("backend_bytes_total", backend="registry") == 100
    assert value("backend_request_duration_seconds_count", backend="registry") == 1
    assert value("mount_timestamp_seconds") == 1000.5
    assert value("mount_info", id=AWKWARD, bootstrap="/x/boot", backend="registry") == 1
    # The other image has its own.
    assert value("read_bytes_total", mountpoint="/a b") == 0


def test_daemon_and_process(daemon, caplog):
    daemon.enter(State.READY)
    daemon.events.count = 5
    _, samples = parse(exposition(daemon))
    states = {labels[0][1]: n for (name, labels), n in samples.items() if name == "nydusd_state"}
    assert states == {"INIT": 0, "READY": 1, "RUNNING": 0, "STOPPED": 0}
    mounts = {labels[0][1]: n for (name, labels), n in samples.items() if name == "nydusd_mounts"}
    assert mounts == {"rafs": 2, "passthrough_fs": 1}
    assert samples["nydusd_errors_total", ()] == 5
    (build,) = (dict(labels) for name, labels in samples if name == "nydusd_build_info")
    assert set(build) == {"version", "git_commit", "python"}
    now = time.time()
    assert now - 7200 < samples["process_start_time_seconds", ()] < now + 2
    assert samples["process_resident_memory_bytes", ()] > 1 << 20
    assert (
        samples["process_virtual_memory_bytes", ()] > samples["process_resident_memory_bytes", ()]
    )
    assert samples["process_cpu_seconds_total", ()] > 0
    assert 0 < samples["process_open_fds", ()] < samples["process_max_fds", ()]


def test_conventions(daemon):
    families, _ = parse(exposition(daemon))
    for name, family in families.items():
        assert family.documentation, name
        text = exposition(daemon).decode()
        counter = f"# TYPE {name}_total counter\n" in text
        assert counter == (family.type == "counter")
        assert name.startswith(("nydusd_", "process_"))
        # Times in seconds and sizes in bytes, the base units.
        assert not name.endswith(("_ms", "_millis", "_micros", "_kb", "_mb"))


def test_without_any_mount(tmp_path):
    families, _ = parse(exposition(NodeDaemon(NodeOptions(tmp_path))))
    assert "nydusd_build_info" in families
    assert "nydusd_read_bytes" not in families


def test_route_of_the_api(daemon):
    got = answer(daemon, Request("GET", "/metrics"))
    assert (got.status, got.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "nydusd_state" in parse(got.body)[0]
    assert answer(daemon, Request("POST", "/metrics")).status == 400


# The TCP listener


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9100", ("127.0.0.1", 9100)),
        (":9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("node.example:1", ("node.example", 1)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":", "x", "1.2.3.4", "::1:9100", "h:-1", "h:65536", "h:0x1"])
def test_wrong_addresses(text):
    with pytest.raises(ValueError):
        parse_address(text)


@pytest.fixture
def server(daemon):
    server = MetricsServer(("127.0.0.1", 0), daemon)
    yield server
    server.close()


def ask(server, method, path):
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_scrape(server):
    response, body = ask(server, "GET", "/metrics?name[]=x")
    assert response.status == 200
    assert response.headers["Content-Type"] == CONTENT_TYPE
    assert response.headers["Connection"] == "close"
    assert "nydusd_mounts" in parse(body)[0]
    response, body = ask(server, "HEAD", "/metrics")
    assert (response.status, body) == (200, b"")
    assert int(response.headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/api/v1/daemon", 404),
        ("PUT", "/api/v1/daemon/exit", 501),
        ("POST", "/metrics", 501),
    ],
)
def test_nothing_else_is_there(server, daemon, method, path, status):
    assert ask(server, method, path)[0].status == status
    assert not daemon._stop_wanted.is_set()


def test_a_client_that_breaks_off_harms_nobody(server, capsys):
    with socket.create_connection(server.address) as client:
        client.sendall(b"GET /metr")
    with socket.create_connection(server.address) as client:
        client.sendall(b"\xff\0\r\n\r\n")
        assert b"Error code: 400" in b"".join(iter(lambda: client.recv(4096), b""))
    assert ask(server, "GET", "/metrics")[0].status == 200
    assert capsys.readouterr().err == ""


def test_an_address_that_is_taken(server, daemon):
    with pytest.raises(MetricsError, match=r"127\.0\.0\.1:\d+ \(Address already in use\)"):
        MetricsServer(server.address, daemon)
    with pytest.raises(MetricsError, match="metrics cannot be served at"):
        MetricsServer(("no-such-host.invalid", 1), daemon)
