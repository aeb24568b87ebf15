"""The stages of a chain, a file each: read inputs, call the rooms, write outputs."""
