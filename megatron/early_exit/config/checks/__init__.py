"""Checks of settings that concern several fields, by section."""
