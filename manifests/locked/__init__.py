"""Answers SQL from strangers in a process that reaches nothing but the views."""
