"""Images of containers where they are stored: records, and registries, folders and archives."""
