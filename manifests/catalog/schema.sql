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
  keys_sha256 BLOB, source_bytes BIGINT, key_min VARCHAR, key_max VARCHAR, pack_path VARCHAR, pack_sha256 BLOB,
  end_version BIGINT
);
CREATE TABLE log.sources_changed (version BIGINT, corpus VARCHAR, path VARCHAR, vanished INTEGER, changed INTEGER);
CREATE TABLE log.samples_dropped (
  version BIGINT, corpus VARCHAR, path VARCHAR, rows INTEGER, counts VARCHAR, replaces VARCHAR
);
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
  failed_sha256 BLOB, tokens BIGINT, vocabulary INTEGER, device VARCHAR, micro_batch INTEGER,
  metrics MAP(VARCHAR, DOUBLE), end_version BIGINT
);
CREATE TABLE log.shards_retired (
  version BIGINT, corpus VARCHAR, modality VARCHAR, form VARCHAR, fingerprint VARCHAR, reason VARCHAR
);
CREATE TABLE log.forgotten (
  version BIGINT, run VARCHAR, corpus VARCHAR, part INTEGER, rows INTEGER[], keys VARCHAR[], sources_sha256 VARCHAR[],
  files VARCHAR[]
);
CREATE TABLE log.snapshot (
  version BIGINT, run VARCHAR, snapshot VARCHAR, path VARCHAR, sha256 BLOB, rows BIGINT, held_out BIGINT,
  "where" VARCHAR, modalities VARCHAR[], replaces VARCHAR
);
CREATE TABLE log.run_started (
  version BIGINT, run VARCHAR, kind VARCHAR, time TIMESTAMP, host VARCHAR, "commit" VARCHAR, versions VARCHAR,
  config VARCHAR
);
CREATE TABLE log.run_ended (version BIGINT, run VARCHAR, time TIMESTAMP, status VARCHAR, counts VARCHAR);

-- What the log says at the version that is looked at: the variable `as_of`, by default the newest.
CREATE SCHEMA state;
CREATE MACRO state.is_live(began, ended) AS
  began <= getvariable('as_of') AND (ended IS NULL OR ended > getvariable('as_of'));
CREATE VIEW state.applied AS SELECT * FROM log.applied WHERE version <= getvariable('as_of');
CREATE VIEW state.corpus AS
SELECT * FROM log.corpus WHERE version <= getvariable('as_of')
QUALIFY row_number() OVER (PARTITION BY corpus ORDER BY version DESC) = 1;
CREATE VIEW state.part AS SELECT * FROM log.part WHERE state.is_live(version, end_version);
CREATE VIEW state.sources_changed AS
SELECT * FROM log.sources_changed WHERE version <= getvariable('as_of')
QUALIFY row_number() OVER (PARTITION BY corpus ORDER BY version DESC) = 1;
-- An ingest may write a file again that a forget replaced before: it is live again.
CREATE VIEW state.samples_dropped AS
SELECT * FROM log.samples_dropped d WHERE version <= getvariable('as_of') AND NOT EXISTS (
  SELECT 1 FROM log.samples_dropped r
  WHERE r.replaces = d.path AND r.version >= d.version AND r.version <= getvariable('as_of')
);
CREATE VIEW state.recipe AS
SELECT fingerprint, any_value(document)::JSON AS document, min(version) AS version
FROM log.recipe WHERE version <= getvariable('as_of') GROUP BY fingerprint;
CREATE VIEW state.current AS SELECT * FROM log.current WHERE state.is_live(version, end_version);
CREATE VIEW state.tokenizer AS SELECT * FROM log.tokenizer WHERE state.is_live(version, end_version);
CREATE VIEW state.shard AS SELECT * FROM log.shard WHERE state.is_live(version, end_version);
CREATE VIEW state.forgotten AS SELECT * FROM log.forgotten WHERE version <= getvariable('as_of');
-- Two writers of an object store may both have recorded one snapshot: its name holds one content.
CREATE VIEW state.snapshot AS
SELECT * FROM log.snapshot WHERE version <= getvariable('as_of')
QUALIFY row_number() OVER (PARTITION BY snapshot ORDER BY version) = 1;
CREATE VIEW state.run_started AS SELECT * FROM log.run_started WHERE version <= getvariable('as_of');
CREATE VIEW state.run_ended AS SELECT * FROM log.run_ended WHERE version <= getvariable('as_of');
