"""`nydus-image export`: an image as a raw disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from builder.backends import blob_directory, config_text
from builder.cli.common import add_output_json, number
from builder.errors import BuildError
from builder.export import ExportOptions, ExportResult, VerityOptions, export_block
from builder.output import write_file
from builder.progress import Progress
from builder.report import REPORT_MODE, write_report
from erofs.verity import NYDUS_FILLER, HashTree
from erofs.version import VERSION
from fscache.backend import Backend, open_backend

if TYPE_CHECKING:
    from erofs.console import CommandParser

MAX_THREADS = 32
PADDINGS = {"zero": VerityOptions(), "nydus": VerityOptions(filler=NYDUS_FILLER)}


def add_words(parser: CommandParser) -> None:
    """Add the words of the sub-command, and what carries it out."""
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "--block", action="store_true", required=True,
        help="Export RAFS filesystems as raw block disk images",
    )  # fmt: skip
    parser.add_argument(
        "-B", "--bootstrap", metavar="<bootstrap>", type=Path,
        help="Bootstrap of the RAFS filesystem to be exported",
    )  # fmt: skip
    parser.add_argument(
        "-C", "--config", metavar="<config>", type=Path,
        help="Configuration file containing a `BlobCacheEntry` object",
    )  # fmt: skip
    parser.add_argument(
        "-D", "--localfs-dir", metavar="<localfs-dir>", type=Path,
        help="Path to the `localfs` working directory, which also enables the `localfs`"
        " storage backend",
    )  # fmt: skip
    parser.add_argument(
        "--threads", metavar="<threads>", type=_threads, default=4,
        help="Number of worker threads to execute export operation, valid values: [1-32]"
        " [default: 4]",
    )  # fmt: skip
    parser.add_argument(
        "-O", "--output", metavar="<output>", type=Path,
        help="File path for saving the exported content",
    )  # fmt: skip
    _add_verity(parser)
    add_output_json(parser)


def _add_verity(parser: CommandParser) -> None:
    parser.add_argument(
        "--verity", action="store_true", help="Generate dm-verity data for block device"
    )
    parser.add_argument(
        "--verity-padding", metavar="<verity-padding>", choices=PADDINGS, default="zero",
        help="What fills the hash tree up: [default: zero] [possible values: zero, nydus];"
        " 'nydus' gives the original tool's bytes, which veritysetup refuses",
    )  # fmt: skip
    parser.add_argument(
        "--signing-key", metavar="<signing-key>", type=Path,
        help="Private key in PEM to sign the root hash with; needs --verity and --signing-cert",
    )  # fmt: skip
    parser.add_argument(
        "--signing-cert", metavar="<signing-cert>", type=Path, help="Certificate of that key in PEM"
    )
    parser.add_argument(
        "--signature", metavar="<signature>", type=Path,
        help="File path of the signature, PKCS#7 in DER [default: <output>.p7s]",
    )  # fmt: skip
    parser.add_argument(
        "--referrer", metavar="<layout[@name]>",
        help="OCI layout with the image, to write root hash and signature into as its referrer;"
        " needs --verity; without a name the only image",
    )  # fmt: skip


def _threads(text: str) -> int:
    count = number(text)
    if not 1 <= count <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{count} is not in 1..={MAX_THREADS}")
    return count


def _check(arguments: argparse.Namespace) -> None:
    """End with status 2 for words that need others."""
    error = arguments.parser.error
    if (arguments.signing_key is None) != (arguments.signing_cert is None):
        error("--signing-key and --signing-cert are needed together")
    if arguments.signature is not None and arguments.signing_key is None:
        error("--signature needs --signing-key")
    if not arguments.verity and (arguments.signing_key or arguments.referrer):
        error("--signing-key and --referrer need --verity")


class _Vouching:
    """What is done with a root hash beside printing it; all that can fail early has not failed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._signer = self._subject = None
        self._target: Path | None = arguments.signature
        if arguments.signing_key is not None:
            from builder.roothash import RootHashSigner

            self._signer = RootHashSigner(arguments.signing_key, arguments.signing_cert)
        if arguments.referrer is not None:
            from builder.oci.layout import LayoutSource, LayoutTarget

            folder, _, name = arguments.referrer.partition("@")
            subject = LayoutSource(Path(folder), name).resolve()
            self._subject = LayoutTarget(Path(folder)), subject

    def vouch(self, disk: Path, tree: HashTree) -> dict[str, object]:
        """Write signature and referrer; return what to report of them."""
        signature: bytes | None = None
        report: dict[str, object] = {}
        if self._signer is not None:
            signature = self._signer.sign(tree.root)
            target = self._target or disk.with_name(f"{disk.name}.p7s")
            report["signature"] = str(write_file(target, signature, REPORT_MODE))
        if self._subject is not None:
            from builder.referrer import add_verity_referrer

            report["referrer"] = add_verity_referrer(*self._subject, tree, signature).digest
        return report


def run(arguments: argparse.Namespace) -> int:
    """Export, print how to open the hash tree, and write the report."""
    _check(arguments)
    vouching = _Vouching(arguments)
    bootstrap, output, backend = _source(arguments)
    progress = Progress("exporting")
    try:
        result = export_block(
            bootstrap,
            output,
            backend,
            ExportOptions(
                verity=PADDINGS[arguments.verity_padding] if arguments.verity else None,
                threads=arguments.threads,
                progress=progress.callback(),
            ),
        )
    finally:
        progress.end()
        backend.close()
    vouched: dict[str, object] = {}
    if result.tree is not None:
        # Callers read this from the first byte of standard output (spec vm-runtimes 3.4).
        print(f"dm-verity options: {result.tree.options()}")
        vouched = vouching.vouch(result.disk, result.tree)
    if arguments.output_json is not None:
        write_report(arguments.output_json, _report(bootstrap, result) | vouched)
    return 0


def _source(arguments: argparse.Namespace) -> tuple[Path, Path, Backend]:
    """Return the bootstrap, the path of the disk, and where the blobs are."""
    bootstrap, directory, output = arguments.bootstrap, arguments.localfs_dir, arguments.output
    if arguments.config is not None:
        if bootstrap is not None or directory is not None:
            arguments.parser.error(
                "the argument '--config <config>' cannot be used with '--bootstrap <bootstrap>'"
                " or '--localfs-dir <localfs-dir>'"
            )
        if output is None:
            arguments.parser.error("--config needs --output <output>")
        # Imported here: it decodes whole daemon configurations, which nearly nobody gives.
        from fscache.blobentry import parse_blob_entry

        entry = parse_blob_entry(config_text(arguments.config))
        if entry.metadata_path is None:
            raise BuildError("configuration without metadata_path", path=arguments.config)
        return entry.metadata_path, output, open_backend(entry.config.backend)
    if bootstrap is None:
        arguments.parser.error("both option `-C/--config` and `-B/--bootstrap` are missing")
    if directory is None:
        arguments.parser.error(
            "the following required arguments were not provided:\n  --localfs-dir <localfs-dir>"
        )
    if output is None:
        output = directory / f"{bootstrap.name}.disk"
    return bootstrap, output, blob_directory(directory)


def _report(bootstrap: Path, result: ExportResult) -> dict[str, object]:
    return {
        "version": VERSION,
        "bootstrap": str(bootstrap),
        "disk": str(result.disk),
        "size": result.size,
        "block_size": result.block_size,
        "blobs": result.blobs,
        "verity": None if result.tree is None else result.tree.as_json(),
    }
