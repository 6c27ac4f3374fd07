"""The command lines by which acceld and nydus-snapshotter call the builder (spec tools 2.14)."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from builder.bootstrap import inlined_bootstrap
from erofs.framing import read_toc
from erofs.view import View
from tests.fakes.oci_image import LOWER, UPPER

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60


def _nydus_image(*words, status=0, stdin=b"/"):
    done = subprocess.run(
        [sys.executable, "-m", "builder.cli", *map(str, words)],
        cwd=ROOT, input=stdin, capture_output=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr.decode()
    return done


def _through_fifos(tmp_path, plain, *words):
    """Feed the builder a FIFO and read the blob from another, as the converter does."""
    source, blob = tmp_path / "blob.targz", tmp_path / "blob.rafs"
    for path in (source, blob):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    feeder = threading.Thread(target=source.write_bytes, args=(plain,), daemon=True)
    found = []
    reader = threading.Thread(target=lambda: found.append(blob.read_bytes()), daemon=True)
    feeder.start()
    reader.start()
    _nydus_image(*words, "--blob", blob, *_NATIVE, source)
    feeder.join(SECONDS)
    reader.join(SECONDS)
    return found[0]


_NATIVE = ("--whiteout-spec", "none", "--fs-version", "6", "--blob-inline-meta", "--features",
           "blob-toc", "--compressor", "zstd", "--chunk-size", "0x100000")  # fmt: skip


def test_help_tells_what_the_converter_looks_for():
    text = _nydus_image("create", "-h").stdout.decode()
    for word in ("--type", "tar-rafs", "--batch-size", "--encrypt"):
        assert word in text


@pytest.mark.parametrize("word", ["--type", "--source-type"])
def test_layers_are_built_and_merged(tmp_path, word):
    create = ("create", "--log-level", "warn", "--prefetch-policy", "fs", word, "tar-rafs")
    layers = []
    for plain in (LOWER, UPPER):
        blob = _through_fifos(tmp_path, plain, *create)
        digest = hashlib.sha256(blob).hexdigest()
        (tmp_path / "whole").write_bytes(blob)
        (tmp_path / digest).write_bytes(inlined_bootstrap(tmp_path / "whole"))
        layers.append(tmp_path / digest)
    report = tmp_path / "merge-output.json"
    _nydus_image("merge", "--log-level", "warn", "--prefetch-policy", "fs", "--output-json",
                 report, "--bootstrap", tmp_path / "bootstrap", *layers)  # fmt: skip
    assert set(json.loads(report.read_text())["blobs"]) <= {path.name for path in layers}
    _nydus_image("check", "--log-level", "warn", "--bootstrap", tmp_path / "bootstrap")


def test_zran_layers_are_built_and_merged(tmp_path):
    words, lists = [], {"digests": [], "tocs": [], "sizes": []}
    for plain in (LOWER, UPPER):
        packed = gzip.compress(plain, mtime=0)
        source, blob = tmp_path / "blob.targz", tmp_path / "blob.rafs"
        source.write_bytes(packed)
        _nydus_image("create", "--log-level", "warn", "--type", "targz-ref", "--blob-inline-meta",
                     "--features", "blob-toc", "--blob", blob, source, stdin=b"")  # fmt: skip
        data = blob.read_bytes()
        lists["digests"].append(hashlib.sha256(data).hexdigest())
        lists["tocs"].append(hashlib.sha256(read_toc(View(data)).raw[:-512]).hexdigest())
        lists["sizes"].append(str(len(data)))
        layer = tmp_path / hashlib.sha256(packed).hexdigest()
        layer.write_bytes(inlined_bootstrap(blob))
        words.append(layer)
    _nydus_image("merge", "--log-level", "warn", "--prefetch-policy", "fs", "--output-json",
                 tmp_path / "o.json", "--bootstrap", tmp_path / "bootstrap", *words,
                 "--blob-digests", ",".join(lists["digests"]), "--blob-toc-digests",
                 ",".join(lists["tocs"]), "--blob-sizes", ",".join(lists["sizes"]))  # fmt: skip
    blobs = json.loads((tmp_path / "o.json").read_text())["blobs"]
    assert set(blobs) == {path.name for path in words}


def test_layer_is_unpacked_again(tmp_path):
    tar = tmp_path / "layer.tar"
    tar.write_bytes(LOWER)
    _nydus_image("create", "--log-level", "warn", "--type", "tar-rafs", "--blob",
                 tmp_path / "image.blob", *_NATIVE, tar, stdin=b"")  # fmt: skip
    boot = tmp_path / "image.boot"
    boot.write_bytes(inlined_bootstrap(tmp_path / "image.blob"))
    _nydus_image("unpack", "--log-level", "warn", "--bootstrap", boot, "--output",
                 tmp_path / "oci.tar", "--blob", tmp_path / "image.blob")  # fmt: skip
    listed = subprocess.run(
        ["tar", "-tf", tmp_path / "oci.tar"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"etc/conf", "data/hard", "dir/a"} <= set(listed)
