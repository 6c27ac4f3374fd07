"""Proof that a Nydus image has the tree of its source: both are walked and compared.

The source is read by the standard library's tar reader and laid together by rules of its own,
so that a fault of the builder's does not hide itself.
"""
