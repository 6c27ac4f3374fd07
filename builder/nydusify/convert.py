"""`nydusify convert`."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from builder.convert.bootlayer import extract_bootstrap
from builder.convert.cache import CachePlace, LayerRecords, LocalRecords
from builder.convert.driver import Conversion, ConversionResult
from builder.convert.model import convert_model
from builder.convert.options import ConvertOptions, Dictionary
from builder.convert.reverse import Reverse
from builder.nydusify.batch import convert_list
from builder.nydusify.convertwords import CONVERT
from builder.nydusify.flags import UsageError, Values
from builder.nydusify.hook.plugin import VARIABLE, HookPlugin
from builder.nydusify.places import Places, seconds
from builder.nydusify.stores import blob_reader, blob_store
from builder.oci.errors import ImageError
from builder.oci.names import parse_reference
from builder.oci.place import BlobStore, Source, Target
from builder.oci.records import Manifest
from builder.output import write_file
from builder.progress import progress_during
from builder.proof.prover import Prover, SourceReader
from erofs.rafs import Compressor, Digester
from erofs.version import VERSION

__all__ = ["COMMAND", "convert_one", "run", "target_text"]

logger = logging.getLogger(__name__)

COMMAND = CONVERT
MAX_RECORDS = 200
COMPRESSORS = {
    "none": Compressor.NONE,
    "lz4_block": Compressor.LZ4_BLOCK,
    "zstd": Compressor.ZSTD,
}
_DICTIONARY = "bootstrap"
_MODEL = "model-artifact"


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Convert one image; return the exit status."""
    check_words(values)
    if values.text("source-file"):
        return convert_list(values, environment)
    if not values.text("source"):
        raise UsageError('Required flag "source" not set', shows_help=True)
    if values.flag("reverse"):
        return _reverse(values, environment)
    kind = values.text("source-backend-type")
    if kind == _MODEL:
        return _model(values, environment)
    if kind == "modelfile":
        raise ImageError(
            "the storage of modctl is not read: push the artifact, and take"
            f" --source-backend-type {_MODEL}"
        )
    result = convert_one(values, environment, values.text("source"), target_text(values))
    path = values.text("output-json")
    if path:
        write_file(Path(path), metrics(result), 0o644)
    return 0


def check_words(values: Values) -> None:
    """Refuse words that exclude each other, with the real tool's messages."""
    if values.text("prefetch-dir") and values.flag("prefetch-patterns"):
        raise UsageError("--prefetch-dir conflicts with --prefetch-patterns")
    if values.text("build-cache") and values.text("build-cache-tag"):
        raise UsageError("--build-cache conflicts with --build-cache-tag")
    if not 1 <= values.number("build-cache-max-records") <= MAX_RECORDS:
        raise UsageError(f"--build-cache-max-records should not be greater than {MAX_RECORDS}")
    version = values.text("fs-version")
    if version not in ("5", "6"):
        raise UsageError("--fs-version should be one of [5 6]")
    if values.flag("oci-ref"):
        if not values.flag("oci"):
            logger.warning("forcibly enabled `--oci` option when `--oci-ref` be enabled")
        if version == "5":
            logger.warning("forcibly using fs version 6 when oci_ref option enabled")
    elif version == "5":
        if number(values, "batch-size"):
            raise UsageError(
                "convert image: pack tar to nydus: '--batch-size' can only be supported by fs"
                " version 6"
            )
        raise UsageError("RAFS v5 is not written, only v6 is: leave --fs-version out")
    if values.text("compressor") not in COMPRESSORS:
        raise UsageError(
            f"--compressor {values.text('compressor')}: should be one of {', '.join(COMPRESSORS)}"
        )


def number(values: Values, name: str) -> int:
    """Return a decimal or `0x` number; raise `UsageError`."""
    try:
        return int(values.text(name), 0)
    except ValueError:
        raise UsageError(f"--{name}: no number: {values.text(name)!r}") from None


def target_text(values: Values) -> str:
    """Return the reference of the result; raise `UsageError`."""
    target, suffix = values.text("target"), values.text("target-suffix")
    if target and suffix:
        raise UsageError("--target conflicts with --target-suffix")
    if suffix:
        reference = parse_reference(values.text("source"))
        return str(reference.with_tag(f"{reference.tag or 'latest'}{suffix}"))
    if not target:
        raise UsageError("--target or --target-suffix is required")
    return target


def metrics(result: ConversionResult) -> bytes:
    """Return the metrics of a conversion, times in nanoseconds."""
    return json.dumps(
        {
            "SourceImageSize": result.source_bytes,
            "TargetImageSize": result.target_bytes,
            "SourcePullElapsed": round(result.pull_seconds * 1e9),
            "ConversionElapsed": round(result.convert_seconds * 1e9),
            "TargetPushElapsed": round(result.push_seconds * 1e9),
        }
    ).encode()


@contextmanager
def work_directory(values: Values, prefix: str = "nydus-converter-") -> Iterator[Path]:
    """Make a scratch directory, and remove it with all that is in it."""
    top = Path(values.text("work-dir"))
    top.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=top) as directory:
        yield Path(directory)


def open_places(values: Values, environment: Mapping[str, str], stack: ExitStack) -> Places:
    """Return what opens the places of a conversion."""
    return Places(
        environment,
        stack,
        plain_http=values.flag("plain-http"),
        retry_count=values.number("push-retry-count"),
        retry_delay=seconds(values.text("push-retry-delay")),
        mirrors=values.texts("mirror"),
        hosts=values.text("hosts-dir"),
    )


def convert_one(
    values: Values, environment: Mapping[str, str], source_text: str, target: str
) -> ConversionResult:
    """Convert one reference to another; raise `NydusError`."""
    with ExitStack() as stack:
        work = stack.enter_context(work_directory(values))
        places = open_places(values, environment, stack)
        store = blob_store(values, "backend", work, places.retry, stack)
        hook = _hook(environment, stack)
        source = places.source(
            source_text, values.flag("source-insecure"), values.text("source-archive")
        )
        place = places.target(
            target, values.flag("target-insecure"), values.text("target-archive"), source
        )
        progress = _progress(values, "converting", stack)
        options = ConvertOptions(
            work=work,
            builder_version=VERSION,
            compressor=COMPRESSORS[values.text("compressor")],
            chunk_size=number(values, "fs-chunk-size"),
            batch_size=number(values, "batch-size"),
            oci_ref=values.flag("oci-ref"),
            oci=values.flag("oci"),
            merge_platform=values.flag("merge-platform"),
            with_referrer=values.flag("with-referrer"),
            all_platforms=values.flag("all-platforms"),
            platforms=values.text("platform"),
            patterns=_patterns(values),
            dictionary=_dictionary(values, places, work),
            progress=progress,
        )
        prover = None
        if not values.flag("no-proof"):
            prover = _prover(values, source, place, store or place, options, stack)
        cache = _records(values, places, target, store or place, options)
        return Conversion(
            source,
            place,
            options,
            store,
            cache,
            prover,
            before_push=None if cache is None else cache.publish,
            hook=hook,
        ).run()


def _reverse(values: Values, environment: Mapping[str, str]) -> int:
    """Convert a Nydus image to OCI; return the exit status."""
    with ExitStack() as stack:
        work = stack.enter_context(work_directory(values, "nydusify-reverse-"))
        places = open_places(values, environment, stack)
        source = places.source(
            values.text("source"), values.flag("source-insecure"), values.text("source-archive")
        )
        text = target_text(values)
        target = places.target(
            text, values.flag("target-insecure"), values.text("target-archive"), source
        )
        blobs = blob_reader(values, "source-backend", stack)
        logger.info(
            "Starting reverse conversion from Nydus image %s to OCI image %s", source.name, text
        )
        reverse = Reverse(source, target, work, blobs, proves=not values.flag("no-proof"))
        reverse.run(values.text("platform"), values.flag("all-platforms"))
        logger.info(
            "Successfully converted Nydus image %s to OCI image %s", source.name, target.name
        )
    return 0


def _model(values: Values, environment: Mapping[str, str]) -> int:
    """Make a model artifact mountable; return the exit status."""
    with ExitStack() as stack:
        work = stack.enter_context(work_directory(values))
        places = open_places(values, environment, stack)
        source = places.source(
            values.text("source"), values.flag("source-insecure"), values.text("source-archive")
        )
        target = places.target(
            target_text(values), values.flag("target-insecure"), values.text("target-archive"),
            source,
        )  # fmt: skip
        convert_model(source, target, number(values, "fs-chunk-size"), work)
    return 0


def _records(
    values: Values, places: Places, target: str, blobs: BlobStore, options: ConvertOptions
) -> LayerRecords | None:
    """Return what knows the layers that were converted before; raise `NydusError`."""
    text, tag = values.text("build-cache"), values.text("build-cache-tag")
    folder = values.text("build-cache-dir")
    if tag:
        text = str(parse_reference(target).with_tag(tag))
    if not text and not folder:
        return None
    insecure = values.flag("build-cache-insecure") or values.flag("target-insecure")
    image, stored = None, None
    if text:
        if values.text("target-archive") or values.text("backend-type"):
            raise UsageError("a cache image needs the blobs in the target's registry")
        stored = places.source(target, values.flag("target-insecure"))
        image = CachePlace(
            places.source(text, insecure),
            places.target(text, insecure, source=stored),
            values.text("build-cache-version"),
            values.number("build-cache-max-records"),
        )
    local = LocalRecords(Path(folder)) if folder else None
    return LayerRecords(options.layer_key(), blobs, stored, image, local)


def _prover(
    values: Values,
    source: Source,
    target: Target,
    blobs: BlobStore,
    options: ConvertOptions,
    stack: ExitStack,
) -> Prover:
    """Return what compares the result with the source, and where its statement goes."""
    reader = SourceReader(
        source,
        options.chunk_size,
        Digester.SHA256 if options.oci_ref else Digester.BLAKE3,
        options.layers_at_once,
    )
    stack.callback(reader.close)
    where = values.text("proof")
    return Prover(
        source,
        target,
        blobs,
        options.work,
        reader,
        options=options.layer_key(),
        version=options.builder_version,
        file=None if where in ("referrer", "none") else Path(where),
        publishes=where != "none",
        progress=_progress(values, "comparing", stack),
    )


def _hook(environment: Mapping[str, str], stack: ExitStack) -> HookPlugin | None:
    """Start the hook plug-in that the environment names; raise `PluginError`."""
    path = environment.get(VARIABLE, "")
    if not path:
        return None
    hook = HookPlugin(Path(path), environment)
    stack.callback(hook.close)
    return hook


def _progress(values: Values, what: str, stack: ExitStack) -> Callable[[int], None] | None:
    """Return what tells bytes on a terminal; images of a list would write over each other."""
    if values.text("source-file"):
        return None
    return progress_during(stack, what)


def _patterns(values: Values) -> tuple[bytes, ...]:
    if values.text("prefetch-dir"):
        return (values.text("prefetch-dir").encode("utf-8", "surrogateescape"),)
    if values.flag("prefetch-patterns"):
        lines = [line for line in sys.stdin.buffer.read().split(b"\n") if line.strip()]
        return tuple(lines) or (b"/",)
    return (b"/",)


def _dictionary(values: Values, places: Places, work: Path) -> Dictionary | None:
    """Fetch the chunk dictionary that is named; raise `NydusError`."""
    text = values.text("chunk-dict")
    if not text:
        return None
    kind, _, rest = text.partition(":")
    place, colon, name = rest.partition(":")
    if kind != _DICTIONARY or not colon or place not in ("registry", "local"):
        raise UsageError("parse chunk dict arguments: invalid args")
    if place == "local":
        data = Path(name).read_bytes()
        return Dictionary(Path(name), hashlib.sha256(data).hexdigest())
    source = places.source(name, values.flag("chunk-dict-insecure"))
    descriptor = source.resolve()
    manifest = Manifest.parse(source.document(descriptor), descriptor.media_type)
    layer = manifest.bootstrap
    if layer is None:
        raise ImageError(f"chunk dict image {name} is no Nydus image")
    path = work / "nydus-chunk-dict"
    extract_bootstrap(source.pieces(layer), layer, path)
    blobs = tuple(one for one in manifest.layers if one.is_nydus_blob)
    return Dictionary(path, layer.hex, blobs, source)
