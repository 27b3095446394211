-- The views people query; their names and columns are promised. `samples`, `failures` and the content views
-- (`boxes`, `instances`, `captions`, `palettes`, `metadata`) read Parquet files and are made by content.py when a
-- query needs them.

CREATE VIEW corpora AS
SELECT c.corpus, c.kind, c.source, c.seed, c.part_rows,
  coalesce(p.parts, 0) AS parts, coalesce(p.samples, 0) AS samples, coalesce(p.source_bytes, 0) AS source_bytes,
  coalesce(s.vanished, 0) AS vanished, coalesce(s.changed, 0) AS changed, c.config
FROM (SELECT * FROM log.corpus QUALIFY row_number() OVER (PARTITION BY corpus ORDER BY version DESC) = 1) c
LEFT JOIN (
  SELECT corpus, count(*) AS parts, sum(rows)::BIGINT AS samples, sum(source_bytes)::BIGINT AS source_bytes
  FROM log.part GROUP BY corpus
) p USING (corpus)
LEFT JOIN (
  SELECT corpus, vanished, changed FROM log.sources_changed
  QUALIFY row_number() OVER (PARTITION BY corpus ORDER BY version DESC) = 1
) s USING (corpus)
ORDER BY c.corpus;

CREATE VIEW parts AS
SELECT corpus, part, rows, path, lower(hex(sha256)) AS sha256, size_bytes, source_bytes, version
FROM log.part ORDER BY corpus, part;

CREATE VIEW shards AS
SELECT s.corpus, s.part, s.crop, s.modality, s.form, left(s.fingerprint, 12) AS recipe,
  (c.fingerprint IS NOT NULL) AS is_current, s.rows, s.ok, s.failed, s.absent, s.not_selected, s.forgotten, s.tokens,
  s.vocabulary, s.format, s.size_bytes, s.path, lower(hex(s.sha256)) AS sha256, s.failed_path, s.device, s.micro_batch,
  s.run, s.version
FROM log.shard s
LEFT JOIN log.current c
  ON c.end_version IS NULL AND c.corpus = s.corpus AND c.modality = s.modality AND c.form = s.form
  AND c.fingerprint = s.fingerprint AND coalesce(s.crop, 0) < coalesce(c.crops, 1)
WHERE s.end_version IS NULL;

CREATE VIEW recipes AS
SELECT left(r.fingerprint, 12) AS recipe, r.document ->> 'modality' AS modality, r.document ->> 'form' AS form,
  r.document ->> 'producer' AS producer, (r.document ->> 'version')::INTEGER AS producer_version,
  r.document ->> 'weights' AS weights, r.document -> 'parameters' AS parameters, r.document -> 'crop' AS crop,
  r.document -> 'inputs' AS inputs,
  coalesce((
    SELECT list(c.corpus ORDER BY c.corpus) FROM log.current c
    WHERE c.end_version IS NULL AND c.fingerprint = r.fingerprint
  ), []) AS current_in,
  r.fingerprint, r.version
FROM (
  SELECT fingerprint, any_value(document)::JSON AS document, min(version) AS version FROM log.recipe GROUP BY fingerprint
) r
ORDER BY modality, form, r.version;

-- One row a corpus, modality and form, by the current recipe. A part is done when every crop asked for has a shard.
CREATE VIEW coverage AS
SELECT c.corpus, c.modality, c.form, left(c.fingerprint, 12) AS recipe, c.crops,
  p.parts, coalesce(d.parts_done, 0) AS parts_done, p.parts - coalesce(d.parts_done, 0) AS parts_missing,
  coalesce(d.parts_with_failures, 0) AS parts_with_failures,
  p.rows * coalesce(c.crops, 1) AS rows, coalesce(d.ok, 0) AS ok, coalesce(d.failed, 0) AS failed,
  coalesce(d.absent, 0) AS absent, coalesce(d.other, 0) AS not_selected_or_forgotten,
  coalesce(d.tokens, 0) AS tokens, coalesce(d.size_bytes, 0) AS size_bytes
FROM log.current c
JOIN (SELECT corpus, count(*) AS parts, sum(rows)::BIGINT AS rows FROM log.part GROUP BY corpus) p USING (corpus)
LEFT JOIN (
  SELECT corpus, modality, form, fingerprint,
    count(*) FILTER (WHERE shards = needed) AS parts_done, count(*) FILTER (WHERE failed > 0) AS parts_with_failures,
    sum(ok)::BIGINT AS ok, sum(failed)::BIGINT AS failed, sum(absent)::BIGINT AS absent, sum(other)::BIGINT AS other,
    sum(tokens)::BIGINT AS tokens, sum(size_bytes)::BIGINT AS size_bytes
  FROM (
    SELECT s.corpus, s.modality, s.form, s.fingerprint, s.part, count(*) AS shards,
      any_value(coalesce(k.crops, 1)) AS needed,
      sum(s.ok) AS ok, sum(s.failed) AS failed, sum(s.absent) AS absent, sum(s.not_selected + s.forgotten) AS other,
      sum(s.tokens) AS tokens, sum(s.size_bytes) AS size_bytes
    FROM log.shard s
    JOIN log.current k
      ON k.end_version IS NULL AND k.corpus = s.corpus AND k.modality = s.modality AND k.form = s.form
      AND k.fingerprint = s.fingerprint AND coalesce(s.crop, 0) < coalesce(k.crops, 1)
    WHERE s.end_version IS NULL
    GROUP BY ALL
  ) GROUP BY ALL
) d ON d.corpus = c.corpus AND d.modality = c.modality AND d.form = c.form AND d.fingerprint = c.fingerprint
WHERE c.end_version IS NULL
ORDER BY c.corpus, c.modality, c.form;

CREATE VIEW tokenizers AS
SELECT name, left(digest, 12) AS digest, family, vocabulary, rows AS fitted_rows, metrics::JSON AS metrics,
  options::JSON AS options, path, (end_version IS NULL) AS is_current, version
FROM log.tokenizer ORDER BY name, version;

-- Two writers of an object store may both have recorded one snapshot: its name holds one content.
CREATE VIEW snapshots AS
SELECT s.snapshot, s.rows, s.held_out, s."where", s.modalities, lower(hex(s.sha256)) AS sha256, s.run, s.version, a.time
FROM (SELECT * FROM log.snapshot QUALIFY row_number() OVER (PARTITION BY snapshot ORDER BY version) = 1) s
JOIN log.applied a USING (version)
ORDER BY s.version;

CREATE VIEW runs AS
SELECT s.run, s.kind, coalesce(e.status, 'running or killed') AS status, s.time AS started_at, e.time AS ended_at,
  date_diff('millisecond', s.time, e.time) / 1000 AS time_s, s.host, s."commit", e.counts::JSON AS counts,
  s.versions::JSON AS versions, s.config::JSON AS config
FROM log.run_started s LEFT JOIN log.run_ended e USING (run)
ORDER BY s.version;

-- Which recipe each recipe of a modality was made from.
CREATE VIEW lineage AS
SELECT r.recipe, r.modality, r.form, r.producer, r.producer_version, r.weights, i.key AS input,
  left(i.value ->> '$', 12) AS input_recipe
FROM recipes r, json_each(r.inputs) AS i;

CREATE VIEW timeline AS
SELECT version, time, run, actions FROM log.applied ORDER BY version;
