"""Training of teacher, assistant and student: batches, losses, soft targets and the Lightning modules."""
