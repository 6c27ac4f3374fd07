"""Guest images for Kata Containers: a small root filesystem as EROFS, with dm-verity, on a disk.

Laid out as Kata's image builder does (spec vm-runtimes 6.1, 6.2).
"""
