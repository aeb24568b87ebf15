"""`distill plan`: dataset sizes, tokens, FLOPs, memory, disk, and teacher requests of a chain, before it runs."""
