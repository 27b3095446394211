"""Indexes the log in DuckDB: tables (`schema.sql`), and the views and macros that users ask (`views.sql`)."""
