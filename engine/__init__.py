"""Runs the flow: from a pipeline file over sources and work items to committed shards, and what people do with them.

pipeline   the pipeline file: its sections, defaults and mistakes
sources    where samples come from: folders, tars, Parquet, lists of URLs; scanning them and reading their bytes
ingest     sources become samples and parts
plan       which recipes are current, which shards are missing, and the work items that make them
work       one work item: decode, label, tokenize, shard
progress   what a run does: its record, its events, and how they are shown
run        the main job, and its runners: in this process or on Ray
export     a workspace, or a part of it, written for others
show       what people look at: tables, pictures, contact sheets, the report
inference  use of a trained model
upkeep     verify, forget, collect, doctor
cli        the command `modmill`, a verb a file
"""
