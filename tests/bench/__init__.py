"""Benchmarks (`make bench`): what our programs cost beside a floor, a ceiling and a peer.

Digits of a shared machine say little, so what counts are ratios: both sides run in turns in
the same run, each round gives one ratio, and the median of the rounds is told with its range.
Nothing here asserts a time.
"""
