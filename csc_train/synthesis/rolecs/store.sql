-- The tables of a synthesis store (store.py), created all or none.
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS settings (hash TEXT PRIMARY KEY, content TEXT NOT NULL, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dialogues (
    id TEXT PRIMARY KEY, settings TEXT NOT NULL, persona TEXT NOT NULL, topic TEXT NOT NULL, mood TEXT NOT NULL,
    replicate INTEGER NOT NULL, status TEXT NOT NULL, extra TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
    owner TEXT NOT NULL, key TEXT NOT NULL, number INTEGER NOT NULL, settings TEXT NOT NULL, role TEXT NOT NULL,
    model TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, latency_s REAL NOT NULL, failure TEXT, PRIMARY KEY (owner, key, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    owner TEXT NOT NULL, key TEXT NOT NULL, role TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns (
    dialogue TEXT NOT NULL, number INTEGER NOT NULL, speaker TEXT NOT NULL, strategy INTEGER, text TEXT NOT NULL,
    PRIMARY KEY (dialogue, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS verdicts (
    dialogue TEXT NOT NULL, number INTEGER NOT NULL, rule TEXT NOT NULL, keep INTEGER NOT NULL, reason TEXT NOT NULL,
    detail TEXT NOT NULL, PRIMARY KEY (dialogue, number)
) WITHOUT ROWID;
COMMIT;
