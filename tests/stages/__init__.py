"""A package, because its files share their names with those of the rooms that the stages call."""
