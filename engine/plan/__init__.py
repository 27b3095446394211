"""Decides what to do, changing nothing: current recipes, missing shards, groups of labelers, work items, their cost."""
