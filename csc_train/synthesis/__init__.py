"""Dialogues made by language models: RoleCS by five roles, CSConv from recorded calls."""
