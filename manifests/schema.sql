-- The private index of a commit log. Everything here is rebuilt from the log at will; people query the views.
CREATE SCHEMA log;
CREATE TABLE log.applied (
  version BIGINT, txn VARCHAR, run VARCHAR, time TIMESTAMP, sha256 VARCHAR, actions INTEGER
);
CREATE TABLE log.corpus (
  version BIGINT, corpus VARCHAR, kind VARCHAR, source VARCHAR, seed BIGINT, part_rows INTEGER, config VARCHAR
);
CREATE TABLE log.part (
  version BIGINT, corpus VARCHAR, part INTEGER, rows INTEGER, path VARCHAR, sha256 BLOB, size_bytes BIGINT,
  keys_sha256 BLOB, source_bytes BIGINT
);
CREATE TABLE log.sources_changed (version BIGINT, corpus VARCHAR, path VARCHAR, vanished INTEGER, changed INTEGER);
CREATE TABLE log.recipe (version BIGINT, fingerprint VARCHAR, document VARCHAR);
CREATE TABLE log.current (
  version BIGINT, corpus VARCHAR, modality VARCHAR, form VARCHAR, fingerprint VARCHAR, crops INTEGER, end_version BIGINT
);
CREATE TABLE log.tokenizer (
  version BIGINT, name VARCHAR, digest VARCHAR, path VARCHAR, family VARCHAR, family_version INTEGER, vocabulary INTEGER, options VARCHAR,
  rows INTEGER, metrics VARCHAR, end_version BIGINT
);
CREATE TABLE log.shard (
  version BIGINT, run VARCHAR, corpus VARCHAR, part INTEGER, crop INTEGER, modality VARCHAR, form VARCHAR,
  fingerprint VARCHAR, path VARCHAR, format VARCHAR, sha256 BLOB, size_bytes BIGINT, rows INTEGER, ok INTEGER,
  failed INTEGER, absent INTEGER, not_selected INTEGER, forgotten INTEGER, keys_sha256 BLOB, failed_path VARCHAR,
  failed_sha256 BLOB, tokens BIGINT, vocabulary INTEGER, device VARCHAR, micro_batch INTEGER, end_version BIGINT
);
CREATE TABLE log.snapshot (
  version BIGINT, run VARCHAR, snapshot VARCHAR, path VARCHAR, sha256 BLOB, rows BIGINT, held_out BIGINT,
  "where" VARCHAR, modalities VARCHAR[]
);
CREATE TABLE log.run_started (
  version BIGINT, run VARCHAR, kind VARCHAR, time TIMESTAMP, host VARCHAR, "commit" VARCHAR, versions VARCHAR,
  config VARCHAR
);
CREATE TABLE log.run_ended (version BIGINT, run VARCHAR, time TIMESTAMP, status VARCHAR, counts VARCHAR);
