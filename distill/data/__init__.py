"""Data sets: readers of the published layouts, the built-in corpus, and safe image decoding."""
