-- The tables of a synthesis store (store.py).
CREATE TABLE settings (hash TEXT PRIMARY KEY, content TEXT NOT NULL, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE dialogues (
    id TEXT PRIMARY KEY, settings TEXT NOT NULL, persona TEXT NOT NULL, topic TEXT NOT NULL, mood TEXT NOT NULL,
    replicate INTEGER NOT NULL, status TEXT NOT NULL, extra TEXT
) WITHOUT ROWID;
CREATE TABLE calls (
    owner TEXT NOT NULL, key TEXT NOT NULL, number INTEGER NOT NULL, settings TEXT NOT NULL, role TEXT NOT NULL,
    model TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, latency_s REAL NOT NULL, failure TEXT, PRIMARY KEY (owner, key, number)
) WITHOUT ROWID;
CREATE TABLE answers (
    owner TEXT NOT NULL, key TEXT NOT NULL, role TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE TABLE turns (
    dialogue TEXT NOT NULL, number INTEGER NOT NULL, speaker TEXT NOT NULL, strategy INTEGER, text TEXT NOT NULL,
    PRIMARY KEY (dialogue, number)
) WITHOUT ROWID;
CREATE TABLE verdicts (
    dialogue TEXT NOT NULL, number INTEGER NOT NULL, rule TEXT NOT NULL, keep INTEGER NOT NULL, reason TEXT NOT NULL,
    detail TEXT NOT NULL, PRIMARY KEY (dialogue, number)
) WITHOUT ROWID;
