"""What is predicted: samples, labels, rationales and prompts. Imports nothing of ours, no torch."""
