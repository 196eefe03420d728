"""RoleCS: dialogues by five roles."""
