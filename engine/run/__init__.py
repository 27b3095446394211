"""Does the main job, `modmill run`: ingest, fit, label and tokenize, commit, snapshot, train; and its dry run.

runners  where work items are done: in this process, or on Ray
"""
