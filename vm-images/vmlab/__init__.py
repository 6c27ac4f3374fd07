"""Virtual machines for the tests: Debian kernels under QEMU, with this machine's root inside.

Standard library only, and nothing of the product, so that the lab cannot hide its defects. This
file imports nothing: the guest's first process starts from here as well.
"""
