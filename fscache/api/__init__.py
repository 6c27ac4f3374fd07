"""The HTTP API: requests to answers, and the sockets that it is served on."""
