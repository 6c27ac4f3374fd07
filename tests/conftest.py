"""Makes `tests/` importable for the helpers that tests share (`capabilities`, `fakes`)."""
