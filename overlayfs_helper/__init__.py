"""The mount helper `nydus-overlayfs`: an overlay without the options that only VM runtimes read.

containerd starts it at least twice for each container, so nothing here imports more than `os`,
`sys` and `ctypes`: no third-party package, none of this project's, and of the standard library
nothing that costs milliseconds (`typing`, `pathlib`, `argparse`, `logging`).
Source: spec vm-runtimes 1.
"""

from overlayfs_helper.cli import main

__all__ = ["main"]
