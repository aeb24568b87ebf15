"""The cascade of student and teacher: posts on which the student is uncertain go to the teacher (arXiv 2509.04459)."""
