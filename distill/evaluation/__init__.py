"""How good the roles are, and the page that shows it."""
