"""One blob in the cache: where its chunks are, which are ready, and how one gets there."""
