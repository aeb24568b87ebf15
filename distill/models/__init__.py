"""Models: teacher, assistant and student implement `Reasoner`, in this process or behind an HTTP endpoint."""
