"""The prediction task: samples, labels, rationales and prompts. Imports no other package of distill, and no torch."""
