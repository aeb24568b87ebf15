"""A package, because its files share their names with those of the gateway."""
