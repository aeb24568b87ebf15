"""`distill plan`: dataset sizes, teacher requests, tokens, FLOPs, memory and disk space of a chain before it runs."""
