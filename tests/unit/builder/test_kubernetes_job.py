"""The Job of docs/kubernetes is what a cluster takes, and calls words that nydusify knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from builder.nydusify.batch import parse_list
from builder.nydusify.convert import COMMAND, check_words
from builder.nydusify.flags import parse_flags

MANIFEST = Path(__file__).resolve().parents[3] / "docs" / "kubernetes" / "nydusify-job.yaml"


@pytest.fixture(scope="module")
def documents():
    found = list(yaml.safe_load_all(MANIFEST.read_text()))
    assert [(one["apiVersion"], one["kind"]) for one in found] == [
        ("v1", "ConfigMap"), ("v1", "PersistentVolumeClaim"), ("batch/v1", "Job"),
    ]  # fmt: skip
    return {one["kind"]: one for one in found}


def test_words_are_known(documents):
    (container,) = documents["Job"]["spec"]["template"]["spec"]["containers"]
    program, command, *words = container["command"]
    assert (program, command) == ("nydusify", "convert")
    environment = {one["name"]: one["value"] for one in container["env"]}
    values = parse_flags(COMMAND.flags, words, environment)
    check_words(values)
    assert values.rest == []
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    # Every place that is named lies on a volume, and what has to survive a crash on one that does.
    used = {name: values.text(name) for name in ("source-file", "report", "build-cache-dir")}
    used |= {"work-dir": values.text("work-dir"), "config": environment["DOCKER_CONFIG"]}
    where = {name: mounts[f"/{path.split('/')[1]}"] for name, path in used.items()}
    volumes = {one["name"]: one for one in documents["Job"]["spec"]["template"]["spec"]["volumes"]}
    assert set(where.values()) <= set(volumes)
    assert where["report"] == where["build-cache-dir"] == "state"
    claim = volumes["state"]["persistentVolumeClaim"]["claimName"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    listed = volumes[where["source-file"]]["configMap"]["name"]
    assert listed == documents["ConfigMap"]["metadata"]["name"]
    name = Path(used["source-file"]).name
    assert parse_list(documents["ConfigMap"]["data"][name], "")
    (item,) = volumes[where["config"]]["secret"]["items"]
    assert item["path"] == "config.json"


def test_job_is_one_that_kubernetes_takes(documents):
    pod = documents["Job"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")
    assert pod["securityContext"]["runAsNonRoot"] is True
    names = [one["name"] for one in pod["volumes"]]
    assert len(names) == len(set(names))
    for one in documents.values():
        assert one["metadata"]["name"].replace("-", "").isalnum()
