"""A package, because some of its files share their names with other test files."""
