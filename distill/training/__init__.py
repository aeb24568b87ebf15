"""How assistant and student learn: batches, losses, soft targets and the Lightning modules over them."""
