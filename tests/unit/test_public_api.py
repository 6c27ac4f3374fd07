"""The public names: a change of this list is a change for users."""

import importlib

import pytest

PUBLIC = {
    "erofs": """BadMagic Bootstrap BootstrapSpec Chunk CodecError CorruptStructure Finding
        FormatError Image Inode IntegrityError Node NydusError OutOfBounds UnsupportedFeature
        check_blob check_image dump_blob dump_image error_context open_bootstrap open_image
        write_bootstrap""",
    "builder": """BuildError BuildOptions BuildResult MergeOptions PrefetchPolicy SourceOptions
        SourceType WhiteoutSpec build merge unpack""",
    "fscache.backend": """AuthError Backend BackendConfig BackendError BackendMetrics BlobReader
        Credentials HttpProxyConfig LocalFsConfig MirrorConfig NotFound ProxyConfig RegistryConfig
        ShortRead Unavailable check_blob_id open_backend""",
    "fscache.config": "ConfigError DaemonConfig load_config parse_config",
    "fscache.daemon": "Daemon LazyUnsupported State StateError",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(PUBLIC[module].split())
    for name in loaded.__all__:
        assert hasattr(loaded, name)
