"""Keeps the commit log: what an entry may say (`actions`), reading and appending (`entries`), and who may write (`lease`)."""
