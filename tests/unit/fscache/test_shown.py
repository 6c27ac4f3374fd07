"""What `GET /api/v1/daemon` shows of a configuration."""

import json

from fscache.api.shown import shown_config
from fscache.config import parse_config

CONFIG = {
    "device": {
        "backend": {"type": "localfs", "config": {"dir": "/blobs"}},
        "cache": {"type": "blobcache", "config": {"work_dir": "/cache"}},
        "external_backends": [
            {"type": "http", "patch": {"auth": "s3cret"}, "config": {"token": "s3cret"}}
        ],
    },
    "mode": "direct",
}


def test_words_for_other_backends_are_not_shown():
    shown = shown_config(parse_config(json.dumps(CONFIG)))
    assert shown["external_backends"] == [{"patch": {}, "type": "http", "config": {}}]
    assert "s3cret" not in json.dumps(shown)
