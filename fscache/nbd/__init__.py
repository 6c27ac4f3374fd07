"""Images as block devices: the NBD protocol, a server, and the kernel's client.

`protocol` and `handshake` are bytes in, values out; `disk` is what is served, `server` has
the sockets and threads, `netlink` and `device` attach it to the kernel.
"""
