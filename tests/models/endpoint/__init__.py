"""A package, because some file names also occur in other test folders."""
