"""Holds what every part of modmill agrees on. Imports nothing of the other packages, and starts in milliseconds.

errors     the tree of errors
commands   commands as messages show them, quoted for a shell
mistakes   what is wrong with a file of options, in words
modality   the table of modalities
recipe     fingerprints of labelers and tokenizers
units      bytes and seconds in words
pixels     the one guarded decoder of images, crops, raw labels
store      reading and writing safely, here or on an object store
log        the commit log, which is the truth, and the lease of its writer
formats    the files of a workspace: shards, sidecars, snapshots
catalog    the index of the log in DuckDB, and the views that answer in SQL
queries    questions of the engine and of users to the catalog
locked     SQL from strangers, in a process of its own
snapshots  frozen selections that training names
recover    a lost log, made again from the files
"""
