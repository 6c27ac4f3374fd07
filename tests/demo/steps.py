"""The steps of the demo after the root filesystem is there: build, serve, mount, run, compare."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fscache.probe import Finding, lazy_supported, probe
from tests.demo.inside import GIT, PYTHON, SHELL, Inside
from tests.demo.report import Fetched, ImageFacts, Printer, percent, size_text
from tests.demo.rootfs import Source
from tests.demo.run import Cleanup, DemoError, Finished, Processes
from tests.demo.serve import BlobServer
from tests.demo.served import Nydusd

__all__ = ["Demo"]

BUILD_SECONDS = 1800.0
MOUNT_SECONDS = 900.0
COMPARE_SECONDS = 1800.0
SHOWN_NAMES = 12
_MODULES = {"nydus-image": "builder.cli", "nydusd": "fscache.cli.nydusd"}


def _program(name: str) -> list[str]:
    """Return how to start one of our commands: installed beside this Python, or from here."""
    script = Path(sys.executable).with_name(name)
    if script.exists():
        return [str(script)]
    code = f"import sys; from {_MODULES[name]} import main; sys.exit(main())"
    return [sys.executable, "-c", code]


class Demo:
    """Shows one root filesystem; `cleanup` gets whatever has to be undone."""

    def __init__(self, work: Path, processes: Processes, cleanup: Cleanup, out: Printer) -> None:
        self._work = work
        self._processes = processes
        self._cleanup = cleanup
        self._out = out
        self._bootstrap = work / "image.boot"
        self._blobs = work / "blobs"
        self._mount = work / "mnt"
        self._api = work / "api.sock"

    def _run(self, name: str, words: Sequence[str], timeout: float) -> Finished:
        """Run one of our commands, show it, and raise `DemoError` when it fails."""
        self._out.command([name, *words])
        return self._check(name, self._processes.run([*_program(name), *words], timeout=timeout))

    @staticmethod
    def _check(name: str, done: Finished) -> Finished:
        if done.status != 0:
            raise DemoError(f"{name} fails with status {done.status}", done.last_errors)
        return done

    def build(self, source: Source) -> ImageFacts:
        """Build the image and print what is in it."""
        self._out.step("Build the image: a blob with the data, a bootstrap with the rest")
        self._blobs.mkdir()
        # Nanoseconds, so that the times can be compared exactly.
        kind = ["tar-rafs", "--pax-mtime"] if source.is_tar else ["dir-rafs"]
        done = self._run(
            "nydus-image",
            ["create", "--type", *kind, "--bootstrap", str(self._bootstrap),
             "--blob-dir", str(self._blobs), str(source.path)],
            BUILD_SECONDS,
        )  # fmt: skip
        image = ImageFacts.read(self._bootstrap)
        for line in image.lines():
            self._out.line(line)
        self._out.line(f"built in {done.seconds:.1f} s")
        return image

    def serve(self) -> BlobServer:
        """Serve the blobs by HTTP, and write the daemon's configuration for it."""
        self._out.step("Serve the blob directory by HTTP with ranges")
        server = BlobServer(self._blobs)
        self._cleanup.add(server.close)
        self._out.command(["python", "-m", "tests.demo.serve", str(self._blobs), str(server.port)])
        config = {
            "version": 2,
            "backend": {"type": "http-proxy", "http-proxy": {"addr": server.address}},
            "cache": {"type": "filecache", "filecache": {"work_dir": str(self._work / "cache")}},
        }
        text = json.dumps(config)
        (self._work / "config.json").write_text(text + "\n")
        self._out.line("$W/config.json: " + self._out.short(text))
        return server

    def show(self, source: Source) -> bool:
        """Show everything that this machine permits; return whether the trees are equal."""
        image = self.build(source)
        server = self.serve()
        findings = probe(self._work)
        missing = next((f for f in findings if f.name in ("erofs", "privilege") and not f.ok), None)
        if missing is not None:
            return self._without_kernel(source, server, missing)
        lazy = lazy_supported(findings)
        daemon, mount_seconds = self._mount_image(lazy)
        before = self._fetched(daemon, server)
        self._out.line(before.line(image))
        self._run_programs(daemon, server, image, mount_seconds)
        for_programs = self._fetched(daemon, server)
        equal = self._compare(source, daemon)
        everything = self._fetched(daemon, server)
        self._out.line(everything.line(image))
        self._end(daemon)
        if lazy.ok and for_programs.requests:
            self._sum_up(image, for_programs, everything)
        return equal

    def _mount_image(self, lazy: Finding) -> tuple[Nydusd, float]:
        if lazy.ok:
            self._out.step("Mount it; data come when they are read")
        else:
            self._out.step("Mount it with --eager: everything is fetched first")
            self._out.line(f"lazy reading is not possible here: {lazy.detail}")
        self._mount.mkdir()
        words = [
            "erofs", "--bootstrap", str(self._bootstrap), "--config",
            str(self._work / "config.json"), "--mountpoint", str(self._mount),
            "--apisock", str(self._api), *([] if lazy.ok else ["--eager"]),
        ]  # fmt: skip
        self._out.command(["nydusd", *words])
        daemon = Nydusd([*_program("nydusd"), *words], self._api, self._work / "nydusd.log")
        self._cleanup.add(daemon.stop)
        # Whoever uses the mount ends before it does.
        self._cleanup.add(self._processes.end_all)
        daemon.start(self._processes)
        seconds = daemon.wait_until_mounted(MOUNT_SECONDS)
        self._out.line(f"mounted {seconds:.2f} s after the start of nydusd")
        return daemon, seconds

    @staticmethod
    def _fetched(daemon: Nydusd, server: BlobServer) -> Fetched:
        requests, transferred = server.counters()
        return Fetched(requests, transferred, daemon.get("metrics/blobcache")["entries_count"])

    def _run_programs(
        self, daemon: Nydusd, server: BlobServer, image: ImageFacts, mount_seconds: float
    ) -> None:
        self._out.step("Run programs inside")
        inside = Inside(self._mount, self._processes, self._out)
        ran = 0
        for program in (PYTHON, GIT, SHELL):
            if program is SHELL and ran:
                break
            done = inside.run(program)
            if done is None:
                continue
            ran += 1
            if ran == 1 and done.first_output is not None:
                of_command = done.first_output - done.begin
                self._out.line(
                    f"time to first output: {mount_seconds + of_command:.2f} s from the start of"
                    f" nydusd, {of_command:.2f} s of them {program[0]}"
                )
            else:
                self._out.line(f"took {done.seconds:.2f} s")
            self._out.line(self._fetched(daemon, server).line(image))
        if not ran:
            names = sorted(path.name for path in self._mount.iterdir())
            more = f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else ""
            self._out.line(
                f"nothing in it runs here; in its root are {', '.join(names[:SHOWN_NAMES])}{more}"
            )

    def _compare(self, source: Source, daemon: Nydusd) -> bool:
        self._out.step("Read everything, and compare the whole tree with the source")
        words = [str(source.path), str(self._mount)]
        if source.is_tar:
            words = [str(self._extract(source.path)), str(self._mount), str(source.path)]
        command = ["-m", "tests.demo.compare", *words]
        self._out.command(["python", *command])
        done = self._processes.run([sys.executable, *command], timeout=COMPARE_SECONDS)
        if done.status not in (0, 1) or not done.stdout:
            raise DemoError("comparing fails", [*done.last_errors, *daemon.log_lines()])
        first, *rest = done.stdout.splitlines()
        self._out.line(f"{first} (in {done.seconds:.1f} s)")
        for line in rest:
            self._out.line(line)
        return done.status == 0

    def _extract(self, tar: Path) -> Path:
        """Let GNU tar say what is in the source: it knows nothing of us."""
        target = self._work / "source"
        target.mkdir()
        target.chmod(0o755)
        command = [
            "tar", "--extract", "--file", str(tar), "--directory", str(target), "--xattrs",
            "--xattrs-include=*", "--numeric-owner", "--same-permissions", "--same-owner",
        ]  # fmt: skip
        self._out.command(command)
        self._check("tar", self._processes.run(command, timeout=BUILD_SECONDS))
        return target

    def _end(self, daemon: Nydusd) -> None:
        self._out.step("Unmount")
        url = "http://localhost/api/v1/daemon/exit"
        self._out.command(["curl", "--request", "PUT", "--unix-socket", str(self._api), url])
        left = daemon.stop()
        if left is not None:
            raise DemoError(left)

    def _sum_up(self, image: ImageFacts, programs: Fetched, everything: Fetched) -> None:
        self._out.line(
            f"\nTo run the programs took {programs.requests:,} of the {everything.requests:,}"
            f" requests ({percent(programs.requests, everything.requests)}) and"
            f" {size_text(programs.transferred_bytes)} of the {size_text(image.blob_bytes)}"
            f" ({percent(programs.transferred_bytes, image.blob_bytes)}) of the whole image.",
            0,
        )

    def _without_kernel(self, source: Source, server: BlobServer, missing: Finding) -> bool:
        self._out.step("Check the image; mounting and running are skipped")
        self._out.line(f"the steps that need the kernel are skipped: {missing.detail}")
        self._run("nydus-image", ["check", str(self._bootstrap)], BUILD_SECONDS)
        self._out.line("the bootstrap is valid")
        self._out.step("Read every file through the HTTP server, and verify every chunk")
        tar = self._work / "unpacked.tar"
        config = json.dumps({"addr": server.address})
        done = self._run(
            "nydus-image",
            ["unpack", "--backend-type", "http-proxy", "--backend-config", config,
             "--output", str(tar), str(self._bootstrap)],
            COMPARE_SECONDS,
        )  # fmt: skip
        requests, transferred = server.counters()
        self._out.line(
            f"every chunk is what its digest says: {requests:,} requests,"
            f" {size_text(transferred)}, {done.seconds:.1f} s"
        )
        if source.is_tar:
            self._out.line("the comparison with the source needs root, too, and is skipped")
            return True
        command = ["tar", "--compare", "--file", str(tar), "--directory", str(source.path)]
        self._out.command(command)
        done = self._processes.run(command, timeout=COMPARE_SECONDS)
        if done.status == 0:
            self._out.line("GNU tar finds no difference between the image and its source")
        else:
            for line in (done.stdout + done.stderr).splitlines()[:20]:
                self._out.line(line)
        return done.status == 0
