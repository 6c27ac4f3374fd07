"""Who fetches which chunk when: on demand and in the background."""
