"""Conversion of images between OCI and Nydus, from any place to any place (spec tools 15, 16)."""
