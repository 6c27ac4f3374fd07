"""The public names: a change of this list is a change for users."""

import importlib

import pytest

PUBLIC = {
    "erofs": """AnyBootstrap AnyInode BadMagic Bootstrap BootstrapSpec BootstrapV5 Chunk CodecError
        CorruptStructure Finding FormatError Image Inode InodeV5 IntegrityError Node NydusError
        OutOfBounds PlacedBlob Translation UnsupportedFeature check_blob check_image dump_blob
        dump_image error_context load_tree open_bootstrap open_image open_rafs translate
        write_bootstrap""",
    "builder": """BuildError BuildOptions BuildResult CompactOptions DictionaryOptions ExportOptions
        ExportResult FileRanges MergeOptions OptimizeOptions PrefetchPolicy SourceOptions SourceType
        VerityOptions WhiteoutSpec build compact export_block generate_dictionary merge optimize
        unpack""",
    "fscache.backend": """AuthError Backend BackendConfig BackendError BackendMetrics BlobReader
        Credentials HttpProxyConfig LocalDiskConfig LocalFsConfig MirrorConfig NotFound
        ObjectStoreConfig ProxyConfig RegistryConfig ShortRead Unavailable check_blob_id
        open_backend""",
    "fscache.config": "ConfigError DaemonConfig load_config parse_config",
    "fscache.daemon": "Daemon LazyUnsupported State StateError Transport",
    "kata": """DmVerity KataVirtualVolume Metadata NydusExtraOptions NydusImage OptionError Profile
        VolumeType parse_verity""",
    "overlayfs_helper": "main",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(PUBLIC[module].split())
    for name in loaded.__all__:
        assert hasattr(loaded, name)
