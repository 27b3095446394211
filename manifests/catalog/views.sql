-- The views people query; docs/manifest.md says which are promised. `samples`, `failures` and the content views
-- (`boxes`, `captions`, ...) read Parquet files and are made by content.py when a query needs them.

CREATE VIEW corpora AS
SELECT c.corpus, c.kind, c.source, c.seed, c.part_rows,
  coalesce(p.parts, 0) AS parts, coalesce(p.samples, 0) AS samples, coalesce(p.source_bytes, 0) AS source_bytes,
  coalesce(s.vanished, 0) AS vanished, coalesce(s.changed, 0) AS changed, c.config
FROM state.corpus c
LEFT JOIN (
  SELECT corpus, count(*) AS parts, sum(rows)::BIGINT AS samples, sum(source_bytes)::BIGINT AS source_bytes
  FROM state.part GROUP BY corpus
) p USING (corpus)
LEFT JOIN state.sources_changed s USING (corpus)
ORDER BY c.corpus;

CREATE VIEW parts AS
SELECT corpus, part, rows, path, lower(hex(sha256)) AS sha256, size_bytes, source_bytes, key_min, key_max, version
FROM state.part;

-- The live shards that are asked for by the current recipes, with the crops asked of them.
CREATE VIEW state.current_shard AS
SELECT s.*
FROM state.shard s
JOIN state.current c
  ON c.corpus = s.corpus AND c.modality = s.modality AND c.form = s.form AND c.fingerprint = s.fingerprint
WHERE coalesce(s.crop, 0) < coalesce(c.crops, 1);

CREATE VIEW shards AS
SELECT s.corpus, s.part, s.crop, s.modality, s.form, left(s.fingerprint, 12) AS recipe,
  (c.fingerprint IS NOT NULL) AS is_current, s.rows, s.ok, s.failed, s.absent, s.not_selected, s.forgotten, s.tokens,
  s.vocabulary, s.format, s.size_bytes, s.path, lower(hex(s.sha256)) AS sha256, s.failed_path, s.device, s.micro_batch,
  s.run, s.version
FROM state.shard s
LEFT JOIN state.current c
  ON c.corpus = s.corpus AND c.modality = s.modality AND c.form = s.form
  AND c.fingerprint = s.fingerprint AND coalesce(s.crop, 0) < coalesce(c.crops, 1);

CREATE VIEW recipes AS
SELECT left(r.fingerprint, 12) AS recipe, r.document ->> 'modality' AS modality, r.document ->> 'form' AS form,
  r.document ->> 'producer' AS producer, (r.document ->> 'version')::INTEGER AS producer_version,
  r.document ->> 'weights' AS weights, r.document -> 'parameters' AS parameters, r.document -> 'crop' AS crop,
  r.document -> 'inputs' AS inputs,
  coalesce((SELECT list(c.corpus ORDER BY c.corpus) FROM state.current c WHERE c.fingerprint = r.fingerprint), [])
    AS current_in,
  r.fingerprint, r.version
FROM state.recipe r
ORDER BY modality, form, r.version;

-- One row a corpus, modality and form, by the current recipe. A part is done when every crop asked for has a shard without
-- rows that were not selected; if that is one crop, shards are parts, and need not be counted part by part.
CREATE VIEW coverage AS
WITH asked AS MATERIALIZED (SELECT *, coalesce(crops, 1) AS needed, row_number() OVER () AS id FROM state.current),
there AS (
  SELECT a.id, count(*) FILTER (WHERE s.not_selected = 0) AS shards, count(*) FILTER (WHERE s.failed > 0) AS with_failures,
    sum(s.ok)::BIGINT AS ok, sum(s.failed)::BIGINT AS failed, sum(s.absent)::BIGINT AS absent,
    sum(s.not_selected + s.forgotten)::BIGINT AS other, sum(s.tokens)::BIGINT AS tokens,
    sum(s.size_bytes)::BIGINT AS size_bytes
  FROM state.shard s
  JOIN asked a
    ON a.corpus = s.corpus AND a.modality = s.modality AND a.form = s.form AND a.fingerprint = s.fingerprint
  WHERE coalesce(s.crop, 0) < a.needed
  GROUP BY a.id
),
by_part AS (
  SELECT id, count(*) FILTER (WHERE shards = needed) AS done, count(*) FILTER (WHERE failed > 0) AS with_failures
  FROM (
    SELECT a.id, s.part, any_value(a.needed) AS needed, count(*) FILTER (WHERE s.not_selected = 0) AS shards,
      sum(s.failed) AS failed
    FROM state.shard s
    JOIN asked a
      ON a.corpus = s.corpus AND a.modality = s.modality AND a.form = s.form AND a.fingerprint = s.fingerprint
    WHERE a.needed > 1 AND coalesce(s.crop, 0) < a.needed
    GROUP BY a.id, s.part
  )
  GROUP BY id
)
SELECT a.corpus, a.modality, a.form, left(a.fingerprint, 12) AS recipe, a.crops, p.parts,
  coalesce(b.done, t.shards, 0) AS parts_done, p.parts - coalesce(b.done, t.shards, 0) AS parts_missing,
  coalesce(b.with_failures, t.with_failures, 0) AS parts_with_failures, p.rows * a.needed AS rows,
  coalesce(t.ok, 0) AS ok, coalesce(t.failed, 0) AS failed, coalesce(t.absent, 0) AS absent,
  coalesce(t.other, 0) AS not_selected_or_forgotten, coalesce(t.tokens, 0) AS tokens,
  coalesce(t.size_bytes, 0) AS size_bytes
FROM asked a
JOIN (SELECT corpus, count(*) AS parts, sum(rows)::BIGINT AS rows FROM state.part GROUP BY corpus) p USING (corpus)
LEFT JOIN there t USING (id)
LEFT JOIN by_part b USING (id)
ORDER BY a.corpus, a.modality, a.form;

-- One row a shard that a current recipe asks for and that is not there, or has rows that were not selected.
CREATE VIEW missing AS
SELECT w.corpus, w.part, w.modality, w.form, left(w.fingerprint, 12) AS recipe, w.crop, w.rows
FROM (
  SELECT p.corpus, p.part, p.rows, c.modality, c.form, c.fingerprint,
    CASE WHEN c.crops IS NOT NULL THEN unnest(range(coalesce(c.crops, 1)))::INTEGER END AS crop
  FROM state.part p JOIN state.current c USING (corpus)
) w
ANTI JOIN state.shard s
  ON s.corpus = w.corpus AND s.part = w.part AND s.modality = w.modality AND s.form = w.form
  AND s.fingerprint = w.fingerprint AND coalesce(s.crop, -1) = coalesce(w.crop, -1) AND s.not_selected = 0;

-- The parts that have everything that a current recipe asks for.
CREATE VIEW complete_parts AS
SELECT p.corpus, p.part, p.rows, n.shards
FROM state.part p
JOIN (SELECT corpus, sum(coalesce(crops, 1))::BIGINT AS shards FROM state.current GROUP BY corpus) n USING (corpus)
JOIN (SELECT corpus, part, count(*) AS shards FROM state.current_shard WHERE not_selected = 0 GROUP BY corpus, part) d
  ON d.corpus = p.corpus AND d.part = p.part AND d.shards = n.shards;

-- Figures of the current shards, one a row: what their counts say, and what was measured as they were made. `asked` are
-- the rows that a value was asked of: what was left out on purpose is no sign of anything.
CREATE VIEW state.metric AS
SELECT corpus, part, crop, modality, form, fingerprint, asked, ok, version,
  unnest(['null_share', 'failed_share', 'tokens_per_row', 'bytes_per_row'] || map_keys(metrics)) AS metric,
  unnest([1 - ok / nullif(asked, 0), failed / nullif(asked, 0), tokens / nullif(ok, 0), size_bytes / nullif(ok, 0)]
    || map_values(metrics)) AS value
FROM (SELECT *, rows - not_selected - forgotten AS asked FROM state.current_shard);

CREATE VIEW quality AS
SELECT corpus, part, crop, modality, form, left(fingerprint, 12) AS recipe, metric, value FROM state.metric;

-- When a shard departs from the history of its recipe. This is the one place of the limits and of the rules.
CREATE VIEW state.alarm_limit AS
SELECT 20 AS drift_shards, 4.0::DOUBLE AS drift_deviations, 0.005::DOUBLE AS least_deviation,
  0.01::DOUBLE AS least_relative_deviation, 0.8::DOUBLE AS least_relative_rows, 3 AS jump_shards,
  0.25::DOUBLE AS null_jump, 0.5::DOUBLE AS collapse, 20 AS equal_rows, 0.9::DOUBLE AS equal_share;

-- The metrics that have a history: extremes and histograms have none. `weight` is the number of rows that a value tells of.
-- `place` is the history that it belongs to, hashed: sorting by the five names would take most of the time.
CREATE VIEW state.judged_metric AS
SELECT *, (hash(corpus, modality, form, fingerprint, metric) >> 1)::BIGINT AS place,
  CASE WHEN metric IN ('null_share', 'failed_share') THEN asked ELSE ok END AS weight
FROM state.metric
WHERE isfinite(value) AND metric NOT IN ('min', 'max', 'label_min', 'label_max')
  AND NOT starts_with(metric, 'score_hist_');

-- A history is sums over its shards, which can be added up: those of `known`, and what versions after `since` add to them.
CREATE TYPE state.sums AS STRUCT(place BIGINT, shards BIGINT, total DOUBLE, squares DOUBLE, weight DOUBLE);
CREATE MACRO state.history(since, known) AS TABLE
SELECT place, sum(shards)::BIGINT AS shards, sum(total) AS total, sum(squares) AS squares, sum(weight)::DOUBLE AS weight
FROM (
  SELECT unnest(known, recursive := true)
  UNION ALL BY NAME
  SELECT place, 1 AS shards, value AS total, value * value AS squares, weight
  FROM state.judged_metric WHERE version > since
)
GROUP BY place;

-- The alarms of versions after `since`; `known` are the histories up to there. So a run asks about its newest shards
-- without a look at all that are older. Sums of squares lose digits that do not matter: a deviation counts as at least a
-- hundredth of the mean.
CREATE MACRO state.alarms_after(since, known) AS TABLE
WITH compared AS (
  SELECT j.*, coalesce(k.shards, 0) + count(*) OVER earlier AS shards_before,
    coalesce(k.total, 0) + coalesce(sum(j.value) OVER earlier, 0) AS total,
    coalesce(k.squares, 0) + coalesce(sum(j.value * j.value) OVER earlier, 0) AS squares,
    coalesce(k.weight, 0) + coalesce(sum(j.weight) OVER earlier, 0) AS weights
  FROM state.judged_metric j LEFT JOIN (SELECT unnest(known, recursive := true)) k USING (place)
  WHERE j.version > since
  WINDOW earlier AS (
    PARTITION BY place ORDER BY j.version, j.part, coalesce(j.crop, 0) ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
  )
),
usual AS (
  SELECT *, total / nullif(shards_before, 0) AS mean,
    coalesce(sqrt(greatest(squares - total * mean, 0) / nullif(shards_before - 1, 0)), 0) AS deviation
  FROM compared
),
judged AS (
  SELECT *, (value - mean) / greatest(deviation, least_deviation + least_relative_deviation * abs(mean)) AS deviations,
    weight * shards_before >= least_relative_rows * weights AS is_comparable,
    metric IN ('duplicates', 'label_duplicates') AND ok >= equal_rows AND value > 1 - 1.5 / ok AS is_all_equal
  FROM usual, state.alarm_limit
),
ruled AS (
  SELECT *,
    CASE
      WHEN metric IN ('not_finite', 'label_not_finite') AND value > 0 AND coalesce(mean, 0) = 0 THEN 'not finite'
      WHEN is_all_equal AND coalesce(mean, 0) < equal_share THEN 'all equal'
      WHEN metric = 'null_share' AND shards_before >= jump_shards AND is_comparable AND value - mean > null_jump
        THEN 'nulls'
      WHEN metric = 'codebook_use' AND shards_before >= jump_shards AND is_comparable AND value < collapse * mean
        THEN 'collapse'
      WHEN shards_before >= drift_shards AND is_comparable AND abs(deviations) > drift_deviations THEN 'drift'
    END AS alarm
  FROM judged
)
SELECT corpus, part, crop, modality, form, left(fingerprint, 12) AS recipe, alarm, metric, value, mean, deviations,
  shards_before, version
FROM ruled WHERE alarm IS NOT NULL
ORDER BY version, part, modality, form, crop, metric;

CREATE VIEW alarms AS SELECT * FROM state.alarms_after(0, []::state.sums[]);

CREATE VIEW tokenizers AS
SELECT name, left(digest, 12) AS digest, family, vocabulary, rows AS fitted_rows, metrics::JSON AS metrics,
  options::JSON AS options, path, state.is_live(version, end_version) AS is_current, version
FROM log.tokenizer WHERE version <= getvariable('as_of') ORDER BY name, version;

CREATE VIEW snapshots AS
SELECT s.snapshot, s.rows, s.held_out, s."where", s.modalities, lower(hex(s.sha256)) AS sha256, s.replaces,
  (SELECT any_value(r.snapshot) FROM state.snapshot r WHERE r.replaces = s.snapshot) AS replaced_by,
  s.run, s.version, a.time
FROM state.snapshot s JOIN log.applied a USING (version)
ORDER BY s.version;

CREATE VIEW runs AS
SELECT s.run, s.kind, coalesce(e.status, 'running or killed') AS status, s.time AS started_at, e.time AS ended_at,
  date_diff('millisecond', s.time, e.time) / 1000 AS time_s, s.host, s."commit", e.counts::JSON AS counts,
  s.versions::JSON AS versions, s.config::JSON AS config
FROM state.run_started s LEFT JOIN state.run_ended e USING (run)
ORDER BY s.version;

-- Which recipe each recipe of a modality was made from.
CREATE VIEW lineage AS
SELECT r.recipe, r.modality, r.form, r.producer, r.producer_version, r.weights, i.key AS input,
  left(i.value ->> '$', 12) AS input_recipe
FROM recipes r, json_each(r.inputs) AS i;

CREATE VIEW forgotten AS
SELECT corpus, part, unnest(rows) AS row, unnest(keys) AS key, unnest(sources_sha256) AS sha256, run, version
FROM state.forgotten;

CREATE VIEW timeline AS
SELECT version, time, run, actions FROM state.applied ORDER BY version;
