"""A student that other tools load: merged weights, processor, model card, and the proof that they do."""
