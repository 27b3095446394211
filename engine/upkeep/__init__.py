"""Keeps a workspace whole: verify, forget, collect; and says what a machine is missing (`doctor`)."""
