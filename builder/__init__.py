"""Builder of RAFS v6 images: sources in, bootstrap and data blobs out."""
