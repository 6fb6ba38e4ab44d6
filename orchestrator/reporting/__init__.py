"""Text, tables and figures for people."""
