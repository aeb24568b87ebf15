"""Where samples come from: readers of the published layouts, the built-in corpus, safe image decoding."""
