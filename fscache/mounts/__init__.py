"""Mounts of the kernel, whatever they hold, and the directories that they are made at."""
