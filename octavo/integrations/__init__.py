"""The edge: where octavo meets other people's libraries. Nothing below imports from here."""
