"""The student answers what it is sure of, the teacher gets the rest (U-ACS, arXiv 2509.04459)."""
