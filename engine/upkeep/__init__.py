"""Keeps a workspace whole: verify, recover, forget, collect; and says what a machine is missing (`doctor`)."""
