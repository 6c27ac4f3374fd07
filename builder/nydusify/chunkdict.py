"""`nydusify chunkdict generate` (spec tools 15.8)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from builder.convert.rework import make_dictionary
from builder.nydusify.convert import work_directory
from builder.nydusify.flags import Command, Flag, UsageError, Values, parse_flags
from builder.nydusify.places import Places
from builder.nydusify.stores import blob_reader
from builder.oci import media
from builder.oci.errors import ImageError

__all__ = ["COMMAND", "run"]

_GENERATE = (
    Flag("sources", "One or more Nydus image references, separated by commas", required=True),
    Flag("target", "Target chunkdict image reference", required=True),
    Flag("source-insecure", "Skip verifying server certs for HTTPS source registry", False),
    Flag("target-insecure", "Skip verifying server certs for HTTPS target registry", False),
    Flag("plain-http", "Enable plain http", False),
    Flag("backend-type", "Where the data is: oss, s3, localfs"),
    Flag("backend-config", "Json configuration string for storage backend"),
    Flag("backend-config-file", "Json configuration file for storage backend"),
    Flag("database", "File of SQLite with the chunks of earlier runs"),
    Flag("work-dir", "Working directory for generating a chunkdict image", "./output"),
    Flag("nydus-image", "Accepted and not used: the builder is built in", "nydus-image"),
    Flag("all-platforms", "Accepted: sources are single images", False, env=""),
    Flag("platform", "Accepted: sources are single images", env=""),
)
COMMAND = Command("chunkdict", "Deduplicate chunk for Nydus image (experimental)", ())


def run(values: Values, environment: Mapping[str, str]) -> int:
    """Generate a dictionary; return the exit status."""
    generate = Command("chunkdict generate", "Generate a chunk dictionary image", _GENERATE)
    if not values.rest:
        print(generate.help_text())
        return 0
    if values.rest[0] != "generate":
        raise UsageError(f"No help topic for '{values.rest[0]}'")
    given = parse_flags(generate.flags, values.rest[1:], environment)
    if "help" in given.given:
        print(generate.help_text())
        return 0
    with ExitStack() as stack:
        work = stack.enter_context(work_directory(given, "chunkdict-"))
        places = Places(environment, stack, plain_http=given.flag("plain-http"))
        sources = []
        for text in given.text("sources").split(","):
            source = places.source(text.strip(), given.flag("source-insecure"))
            descriptor = source.resolve()
            if media.is_index(descriptor.media_type):
                raise ImageError(f"{source.name} is an index, one image is wanted")
            sources.append((source, descriptor))
        target = places.target(
            given.text("target"), given.flag("target-insecure"), source=sources[0][0]
        )
        store = blob_reader(given, "backend", stack)
        make_dictionary(sources, target, given.text("database") or ":memory:", work, store)
    return 0
