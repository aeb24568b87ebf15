"""Metrics of the roles, and the HTML report."""
