"""Export of the student as a transformers folder: merged weights, processor, model card, and a reload check."""
