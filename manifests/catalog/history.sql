-- What changed between versions, what is out of date and why, and who trained on what. docs/manifest.md has the columns;
-- the macros that look into snapshots are made by content.py when a query needs them.

-- The newest version at a moment (a TIMESTAMP is UTC), 0 if the log began later.
CREATE MACRO version_at(moment) AS (
  SELECT coalesce(max(version), 0) FROM state.applied WHERE epoch_us(time) <= epoch_us(moment)
);

-- A number in [0, 1) for a key, from 52 bits of its own hash: splits cut by it. Rows are held out by another hash.
CREATE MACRO split_share(key) AS ('0x' || left(sha256('split/' || key), 13))::BIGINT / 4503599627370496.0;

-- Whether a row of a part stands in a bitmap of `snapshot_parts`: the first row is the lowest bit of the first byte.
CREATE MACRO has_row(bits, row) AS get_bit(bits::BIT, (row // 8 * 8 + 7 - row % 8)::INTEGER) = 1;

-- Every record that may be live or not at a version: what tells it apart, what it says, and from when to when.
CREATE VIEW state.record AS
SELECT 'corpus' AS kind, corpus, NULL::INTEGER AS part, NULL::INTEGER AS crop, NULL AS modality, NULL AS form,
  NULL AS recipe, NULL AS name, source AS what, version AS began,
  lead(version) OVER (PARTITION BY corpus ORDER BY version) AS ended
FROM log.corpus
UNION ALL
SELECT 'part', corpus, part, NULL, NULL, NULL, NULL, NULL, path, version, end_version FROM log.part
UNION ALL
SELECT 'recipe', NULL, NULL, NULL, r.document ->> 'modality', r.document ->> 'form', left(fingerprint, 12), NULL,
  (r.document ->> 'producer') || ' ' || (r.document ->> 'version'), version, NULL
FROM (
  SELECT fingerprint, any_value(document)::JSON AS document, min(version) AS version FROM log.recipe GROUP BY fingerprint
) r
UNION ALL
SELECT 'current', corpus, NULL, NULL, modality, form, NULL, NULL,
  left(fingerprint, 12) || CASE WHEN crops IS NULL THEN '' ELSE ' x ' || crops END, version, end_version
FROM log.current
UNION ALL
SELECT 'tokenizer', NULL, NULL, NULL, NULL, NULL, NULL, name, path, version, end_version FROM log.tokenizer
UNION ALL
SELECT 'shard', corpus, part, crop, modality, form, left(fingerprint, 12), NULL, path, version, end_version FROM log.shard
UNION ALL
SELECT 'snapshot', NULL, NULL, NULL, NULL, NULL, NULL, snapshot, any_value(path), min(version), NULL
FROM log.snapshot GROUP BY snapshot;

-- What is otherwise at version_b than it was at version_a.
CREATE MACRO diff(version_a, version_b) AS TABLE
WITH ends AS MATERIALIZED (
  SELECT least(version_a, getvariable('as_of')) AS a, least(version_b, getvariable('as_of')) AS b
),
records AS (
  SELECT r.*, began <= a AND (ended IS NULL OR ended > a) AS in_a, began <= b AND (ended IS NULL OR ended > b) AS in_b
  FROM state.record r, ends
  WHERE (began <= a AND (ended IS NULL OR ended > a)) <> (began <= b AND (ended IS NULL OR ended > b))
)
SELECT CASE WHEN count(*) FILTER (in_a) = 0 THEN 'added' WHEN count(*) FILTER (in_b) = 0 THEN 'retired' ELSE 'replaced' END
    AS change,
  kind, corpus, part, crop, modality, form, recipe, name, max(what) FILTER (in_a) AS was, max(what) FILTER (in_b) AS now
FROM records
GROUP BY kind, corpus, part, crop, modality, form, recipe, name
HAVING max(what) FILTER (in_a) IS DISTINCT FROM max(what) FILTER (in_b)
ORDER BY kind, corpus, part, modality, form, recipe, crop, name;

-- What decides each recipe's output, one fact a row.
CREATE VIEW state.recipe_fact AS
SELECT fingerprint, unnest(['producer', 'version', 'weights']) AS field,
  unnest([document ->> 'producer', document ->> 'version', document ->> 'weights']) AS value
FROM state.recipe
UNION ALL
SELECT r.fingerprint, g.name || '.' || f.key, f.value ->> '$'
FROM state.recipe r, (VALUES ('parameters'), ('crop'), ('inputs')) AS g(name), json_each(r.document -> g.name) AS f
WHERE json_type(r.document -> g.name) = 'OBJECT';

-- The parts that have shards of a modality, but none by its current recipe: a row for each cause, each difference of
-- the two recipes, followed through their inputs to where it began.
CREATE VIEW stale AS
WITH RECURSIVE outdated AS MATERIALIZED (
  SELECT s.corpus, s.part, s.modality, s.form, s.fingerprint, c.fingerprint AS wanted, count(*) AS shards
  FROM state.shard s
  JOIN state.current c
    ON c.corpus = s.corpus AND c.modality = s.modality AND c.form = s.form AND c.fingerprint <> s.fingerprint
  ANTI JOIN state.shard n
    ON n.corpus = s.corpus AND n.part = s.part AND n.modality = s.modality AND n.form = s.form
    AND n.fingerprint = c.fingerprint
  GROUP BY ALL
),
fact AS MATERIALIZED (SELECT * FROM state.recipe_fact),
compared(fingerprint, wanted, path, old, new) AS (
  SELECT DISTINCT fingerprint, wanted, '', fingerprint, wanted FROM outdated
  UNION ALL
  SELECT c.fingerprint, c.wanted, c.path || a.field || '.', a.value, b.value
  FROM compared c
  JOIN fact a ON a.fingerprint = c.old AND a.field LIKE 'inputs.%'
  JOIN fact b ON b.fingerprint = c.new AND b.field = a.field AND b.value <> a.value
  JOIN fact p ON p.fingerprint = a.value AND p.field = 'producer'
  JOIN fact q ON q.fingerprint = b.value AND q.field = 'producer'
),
-- Another labeler has other parameters: that it is another says it all.
cause AS (
  SELECT c.fingerprint, c.wanted, c.path || f.field AS cause, max(f.value) FILTER (f.fingerprint = c.old) AS was,
    max(f.value) FILTER (f.fingerprint = c.new) AS now
  FROM compared c JOIN fact f ON f.fingerprint IN (c.old, c.new)
  GROUP BY c.fingerprint, c.wanted, c.path, f.field
  HAVING max(f.value) FILTER (f.fingerprint = c.old) IS DISTINCT FROM max(f.value) FILTER (f.fingerprint = c.new)
  QUALIFY f.field = 'producer' OR NOT bool_or(f.field = 'producer') OVER (PARTITION BY c.fingerprint, c.wanted, c.path)
)
SELECT o.corpus, o.part, o.modality, o.form, o.shards, left(o.fingerprint, 12) AS recipe,
  left(o.wanted, 12) AS current_recipe, c.cause, c.was, c.now
FROM outdated o
LEFT JOIN (
  -- An input that was followed is no cause itself.
  SELECT * FROM cause
  WHERE (fingerprint, wanted, cause || '.') NOT IN (SELECT (fingerprint, wanted, path) FROM compared)
) c ON c.fingerprint = o.fingerprint AND c.wanted = o.wanted
ORDER BY o.corpus, o.part, o.modality, o.form, recipe, c.cause;

-- The training runs of each snapshot; `corpora` are those that a run took of it, null if all.
CREATE VIEW snapshot_uses AS
WITH used AS (
  SELECT run, kind, started_at, status, config, unnest(config -> '$.snapshots[*]') AS document
  FROM runs WHERE kind = 'train'
),
taken AS (
  SELECT run, entry ->> 'snapshot' AS uri, entry -> '$.corpora[*]' AS corpora, entry ->> 'corpora' IS NULL AS is_all
  FROM (SELECT run, unnest(config -> '$.mixture[*]') AS entry FROM used)
)
SELECT s.snapshot, u.run, u.kind, u.started_at, u.status,
  (
    SELECT CASE WHEN NOT bool_or(t.is_all)
      THEN list_sort(list_distinct(list_transform(flatten(list(t.corpora)), lambda corpus: corpus ->> '$'))) END
    FROM taken t WHERE t.run = u.run AND t.uri = (u.document ->> 'uri')
  ) AS corpora
FROM used u
-- By content and by name: a workspace may have moved since, and two names may hold one content.
JOIN snapshots s
  ON s.sha256 = (u.document ->> 'sha256') AND s.snapshot = split_part(u.document ->> 'uri', '#', -1)
ORDER BY s.version, u.started_at;
