"""The configuration files of registry, containerd and snapshotter, all below one directory.

The snapshotter's are those that were recorded in fixtures/snapshotter-nydusd; containerd's
transfer service hands it the labels of the image, without which it mounts nothing.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

__all__ = ["METRICS", "REGISTRY", "architecture", "template_text", "write_settings"]

REGISTRY = "localhost:5000"
METRICS = "127.0.0.1:9110"

_REGISTRY = """\
version: 0.1
storage:
  filesystem:
    rootdirectory: {root}/registry
http:
  addr: 127.0.0.1:5000
"""

_CONTAINERD = """\
version = 3
root = '{root}/containerd'
state = '{root}/state'
imports = []
disabled_plugins = ['io.containerd.nri.v1.nri', 'io.containerd.tracing.processor.v1.otlp']

[grpc]
  address = '{root}/containerd.sock'

[plugins.'io.containerd.internal.v1.opt']
  path = '{root}/opt'

[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = 'linux/{architecture}'
  snapshotter = 'nydus'

[proxy_plugins.nydus]
  type = 'snapshot'
  address = '{root}/grpc.sock'
  [proxy_plugins.nydus.exports]
    root = '{root}/sn'
    enable_remote_snapshot_annotations = 'true'
"""

_SNAPSHOTTER = """\
version = 1
root = "{root}/sn"
address = "{root}/grpc.sock"
daemon_mode = "{mode}"
[system]
enable = true
address = "{root}/system.sock"
[daemon]
nydusd_path = "{root}/nydusd"
nydusimage_path = "{root}/nydus-image"
nydusd_config = "{root}/nydusd.json"
fs_driver = "fusedev"
recover_policy = "{recover_policy}"
[cgroup]
enable = false
[log]
log_to_stdout = true
level = "debug"
[metrics]
address = "{metrics}"
collect_interval = "1s"
hung_io_interval = "1s"
[snapshot]
enable_nydus_overlayfs = false
enable_kata_volume = false
"""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def template_text(prefetch: bool) -> str:
    """Return the recorded template of nydusd's configuration, with or without prefetching."""
    backend = {
        "readahead": False, "scheme": "http", "proxy": {"fallback": False},
        "timeout": 5, "connect_timeout": 5, "retry_limit": 2,
    }  # fmt: skip
    fill = {"prefetch_all": True, "threads_count": 8, "merging_size": 1048576}
    return json.dumps(
        {
            "device": {
                "backend": {"type": "registry", "config": backend},
                "cache": {
                    "type": "blobcache",
                    "config": {"work_dir": "", "disable_indexed_map": False},
                },
            },
            "mode": "direct",
            "digest_validate": False,
            "enable_xattr": True,
            "amplify_io": 1048576,
            "fs_prefetch": {"enable": True, **fill} if prefetch else {"enable": False},
        }
    )


def architecture() -> str:
    """Return this machine's name in images."""
    return _ARCHITECTURES[platform.machine()]


def write_settings(root: Path, mode: str, recover_policy: str, *, prefetch: bool) -> None:
    """Write all files that the programs are started with."""
    words = {
        "root": root, "metrics": METRICS, "mode": mode, "recover_policy": recover_policy,
        "architecture": architecture(),
    }  # fmt: skip
    texts = {"registry.yml": _REGISTRY, "containerd.toml": _CONTAINERD, "sn.toml": _SNAPSHOTTER}
    for name, text in texts.items():
        (root / name).write_text(text.format_map(words))
    (root / "nydusd.json").write_text(template_text(prefetch))
