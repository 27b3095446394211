"""Defines the pipeline file: what it may say (`sections`), how it is read (`file`) and checked (`config`)."""
