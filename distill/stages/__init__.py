"""The stages of a chain, one module each: read inputs, call the other packages, write outputs."""
