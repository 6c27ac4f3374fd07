"""The daemon: serves images to the kernel's EROFS and fetches what is read.

`fscache.daemon.Daemon` is the way in, `fscache.config` reads its configuration, and
`fscache.backend.open_backend` opens the places that blobs come from. Nothing is imported
here, so that the builder can use a backend without the kernel's side.
"""
