"""The command lines of `nydusd` and `nydus-backend-proxy`."""
