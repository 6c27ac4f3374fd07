"""Inputs: each reads one kind of source into a tree and hands file content to the chunker."""
