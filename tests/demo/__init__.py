"""The demo behind `make demo`: a real root filesystem, built, served, mounted, run and compared.

`python -m tests.demo`; each module is one part of it, some are programs of their own.
"""
