"""Reads the files of a disk as the kernel does, without one."""

from erofs import open_image


def files_of(disk):
    """Return the content of each regular file by path; device addresses are places of the disk."""
    found = {}
    with open_image(disk) as image:
        for path, inode in image.walk():
            if not inode.is_regular:
                continue
            content = b""
            for index in inode.chunk_indexes():
                block = image.devices[index.blob_index].mapped_blkaddr + index.blkaddr
                start = block * image.block_size
                content += disk[start : start + inode.chunk_size]
            found[path[1:]] = content[: inode.size]
    return found
