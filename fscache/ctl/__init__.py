"""`nydusctl`, a client of the API; it uses nothing of the daemon."""
