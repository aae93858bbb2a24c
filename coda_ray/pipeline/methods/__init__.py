"""How each family of methods is planned; `plans` names the one of every method."""
