-- version: 1
--
-- Hilo's tables. Safe to run again at every release, also by hand: psql "$DATABASE_URL" -f schema.sql
-- Raise the number above with every change, or processes that are running will not apply it.

SET client_min_messages = warning;

-- What Hilo knows of itself: the schema's version, secrets made here, where the catch-up stands.
CREATE TABLE IF NOT EXISTS hilo (
    key   text PRIMARY KEY,
    value text NOT NULL
);
-- Key of the HMAC that stands for a user at OpenAI (safety_identifier).
INSERT INTO hilo VALUES ('safety_secret', gen_random_uuid()::text || gen_random_uuid()::text) ON CONFLICT DO NOTHING;
-- Inbound messages that Twilio has and Hilo lacks are looked for from here on; an empty table begins now.
INSERT INTO hilo VALUES ('caught_up_to', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')) ON CONFLICT DO NOTHING;

-- One row a person. What must outlive a thread is here.
CREATE TABLE IF NOT EXISTS users (
    user_phone       text PRIMARY KEY,           -- the address first seen (whatsapp:+52… or whatsapp:MX.…), opaque
    external_user_id text UNIQUE,                -- Twilio's ExternalUserId: the same person under any address
    reply_to         text NOT NULL,              -- the latest From
    own_number       text,                       -- the number of ours that was written to
    profile_name     text NOT NULL DEFAULT '',
    language         text,
    mode             text NOT NULL DEFAULT 'bot' CHECK (mode IN (
                         'bot',                  -- the assistant answers
                         'human',                -- an advisor answers; the assistant is silent
                         'out')),                -- the user wants no messages
    mode_since       timestamptz,
    mode_until       timestamptz,                -- human: when the assistant takes over again
    mode_run         bigint,                     -- the run that caused the mode: it alone still sends its reply
    seed_after       bigint NOT NULL DEFAULT 0,  -- messages up to this id are not told to a new conversation
    created_at       timestamptz NOT NULL DEFAULT now(),
    last_in_at       timestamptz                 -- the 24-hour window is open from here
);

-- One OpenAI conversation a user. Deleting a row is always a safe repair: the next turn makes a new
-- conversation and tells it the last messages of the transcript.
CREATE TABLE IF NOT EXISTS oa_threads_map (
    user_phone   text PRIMARY KEY,
    thread_id    text NOT NULL
);
ALTER TABLE oa_threads_map ADD COLUMN IF NOT EXISTS assistant_id text;
ALTER TABLE oa_threads_map ADD COLUMN IF NOT EXISTS created_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE oa_threads_map ADD COLUMN IF NOT EXISTS last_used_at timestamptz NOT NULL DEFAULT now();
CREATE UNIQUE INDEX IF NOT EXISTS oa_threads_map_user ON oa_threads_map (user_phone);

-- Conversations to delete at OpenAI, items first; a row goes when that is done.
CREATE TABLE IF NOT EXISTS discarded_threads (
    thread_id text PRIMARY KEY,
    due_at    timestamptz NOT NULL DEFAULT now(),
    attempts  int NOT NULL DEFAULT 0
);

-- A run is one turn: from a user's message(s) to the reply sent.
CREATE TABLE IF NOT EXISTS runs (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_phone  text NOT NULL REFERENCES users ON DELETE CASCADE,
    state       text NOT NULL DEFAULT 'queued' CHECK (state IN (
                    'queued',                 -- has messages to take; no response is under way
                    'waiting',                -- a response of the model is under way: response_id
                    'sending',                -- the reply is written: its parts are messages (out)
                    'done')),
    due_at      timestamptz NOT NULL,         -- when a worker should look at it; while held, the end of the lease
    held        boolean NOT NULL DEFAULT false,
    wakes       int NOT NULL DEFAULT 0,       -- raised by every wake; a put-down compares it, so none is lost
    attempt     int NOT NULL DEFAULT 0,       -- the fencing token: raised by every claim
    crashes     int NOT NULL DEFAULT 0,       -- claims in a row that found the lease run out
    pending     int NOT NULL DEFAULT 0,       -- messages that no run has taken yet
    assistant   text,
    thread_id   text,
    response_id text,
    creating    boolean NOT NULL DEFAULT false, -- a create was begun and its outcome is not known
    rounds      int NOT NULL DEFAULT 0,       -- responses that ended in tool calls
    tries       int NOT NULL DEFAULT 0,       -- responses that came to nothing
    deadline    timestamptz,                  -- past it the fallback answers
    outcome     text CHECK (outcome IN (
                    'answered',               -- by the model
                    'fallback',               -- by the traditional flow
                    'intercepted',            -- by a plugin, or nothing was to be said
                    'undelivered')),          -- Twilio refused a part for good
    reason      text,                         -- why it was the fallback, or Twilio's error code
    created_at  timestamptz NOT NULL DEFAULT now(),
    started_at  timestamptz,
    written_at  timestamptz,
    finished_at timestamptz
);
-- One run that is not done per user: the user's own lock, and the guarantee of order.
CREATE UNIQUE INDEX IF NOT EXISTS runs_one_open ON runs (user_phone) WHERE state <> 'done';
CREATE INDEX IF NOT EXISTS runs_due ON runs (due_at) WHERE state <> 'done';
CREATE INDEX IF NOT EXISTS runs_of_user ON runs (user_phone, id);
CREATE INDEX IF NOT EXISTS runs_finished ON runs (finished_at) WHERE state = 'done';

-- The transcript, the inbox and the outbox in one.
CREATE TABLE IF NOT EXISTS messages (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sid         text UNIQUE,                  -- Twilio's; deduplicates redelivery
    user_phone  text NOT NULL,
    direction   text NOT NULL CHECK (direction IN ('in', 'out')),
    body        text NOT NULL DEFAULT '',
    run_id      bigint,                       -- in: null until a run takes it
    at          timestamptz NOT NULL DEFAULT now(),
    -- in
    raw         jsonb,                        -- every form field, as received
    opt         text CHECK (opt IN ('out', 'in')), -- an opt-out word, or the word to return
    input       jsonb,                        -- what the model reads, once a plugin has told
    reply       jsonb,                        -- what a plugin answered without the model
    -- out, one row a part
    state       text CHECK (state IN (
                    'queued',
                    'sending',                -- handed to Twilio; until the sid is here, in doubt
                    'sent',                   -- Twilio has it
                    'delivered',
                    'read',
                    'undelivered',
                    'failed',
                    'withheld')),             -- the user opted out or went to an advisor before it left
    error_code  int,                          -- Twilio's
    media_url   text,
    content_sid text,
    variables   jsonb,
    sending_at  timestamptz,
    sends       int NOT NULL DEFAULT 0,       -- times it was handed to Twilio
    confirmed   boolean NOT NULL DEFAULT false, -- a status callback said that it left
    updated_at  timestamptz
);
CREATE INDEX IF NOT EXISTS messages_waiting ON messages (user_phone, id) WHERE direction = 'in' AND run_id IS NULL;
CREATE INDEX IF NOT EXISTS messages_of_user ON messages (user_phone, id);
CREATE INDEX IF NOT EXISTS messages_of_run ON messages (run_id, id);

-- Every response of the model: whoever learns of it first, the run or OpenAI's webhook, makes the row.
CREATE TABLE IF NOT EXISTS responses (
    id            text PRIMARY KEY,
    run_id        bigint,
    created_at    timestamptz NOT NULL DEFAULT now(),
    ended_at      timestamptz,                -- told by webhook or seen by a poll
    status        text,
    model         text,
    input_tokens  int,
    output_tokens int
);
CREATE INDEX IF NOT EXISTS responses_of_run ON responses (run_id);
CREATE INDEX IF NOT EXISTS responses_created ON responses (created_at);

-- Every function call of the model. One whose output is here is never run a second time.
CREATE TABLE IF NOT EXISTS tool_calls (
    call_id      text PRIMARY KEY,
    run_id       bigint NOT NULL,
    response_id  text NOT NULL,
    name         text NOT NULL,
    arguments    text NOT NULL,
    output       text,                        -- null: begun, outcome unknown
    ok           boolean,
    milliseconds int,
    started_at   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS tool_calls_of_run ON tool_calls (run_id);

-- Callbacks come out of order: a state only ever gives way to a higher one.
CREATE OR REPLACE FUNCTION state_rank(state text) RETURNS int LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE state WHEN 'queued' THEN 0 WHEN 'sending' THEN 1 WHEN 'sent' THEN 2 WHEN 'withheld' THEN 3
        WHEN 'failed' THEN 3 WHEN 'undelivered' THEN 3 WHEN 'delivered' THEN 4 WHEN 'read' THEN 5 END
$$;

-- Store an inbound message and make or refresh its user's run; no row where the sid is known already.
-- The user's row is locked first, so ids grow in the order of commits for each user.
CREATE OR REPLACE FUNCTION receive_message(
    p_sid text, p_from text, p_to text, p_external text, p_profile text, p_body text, p_raw jsonb, p_opt text,
    p_burst double precision, p_at timestamptz
) RETURNS TABLE (id bigint, held boolean, seconds double precision) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    who text;
    message_id bigint;
BEGIN
    SELECT u.user_phone INTO who FROM users u WHERE u.external_user_id = p_external OR u.user_phone = p_from
        ORDER BY u.external_user_id = p_external DESC NULLS LAST LIMIT 1;
    INSERT INTO users AS u (user_phone, external_user_id, reply_to, own_number, profile_name, last_in_at)
        VALUES (coalesce(who, p_from), p_external, p_from, p_to, p_profile, p_at)
        ON CONFLICT (user_phone) DO UPDATE SET
            reply_to = excluded.reply_to, own_number = excluded.own_number, last_in_at = greatest(u.last_in_at, p_at),
            external_user_id = coalesce(excluded.external_user_id, u.external_user_id),
            profile_name = coalesce(nullif(excluded.profile_name, ''), u.profile_name)
        RETURNING u.user_phone INTO who;
    INSERT INTO messages (sid, user_phone, direction, body, raw, opt, at)
        VALUES (p_sid, who, 'in', p_body, p_raw, p_opt, p_at) ON CONFLICT (sid) DO NOTHING RETURNING id INTO message_id;
    IF message_id IS NULL THEN
        RETURN;
    END IF;
    IF p_opt IS NOT NULL THEN -- from here on a run under way sends nothing more; the one that takes this message will
        UPDATE users u SET mode = CASE p_opt WHEN 'out' THEN 'out' ELSE 'bot' END, mode_since = now(), mode_until = NULL,
            mode_run = NULL WHERE u.user_phone = who AND (p_opt = 'out' OR u.mode = 'out');
    END IF;
    RETURN QUERY INSERT INTO runs AS r (user_phone, due_at, pending) VALUES (who, now() + p_burst * interval '1 s', 1)
        ON CONFLICT (user_phone) WHERE state <> 'done' DO UPDATE SET
            pending = r.pending + 1, wakes = r.wakes + 1,
            due_at = CASE WHEN r.held OR r.state <> 'queued' OR r.tries > 0 THEN r.due_at
                ELSE least(excluded.due_at, r.created_at + 5 * greatest(p_burst, 0.2) * interval '1 s') END
        RETURNING r.id, r.held, extract(epoch FROM r.due_at - now())::float8;
END $$;

-- Leave a user's conversation for good: nothing said so far is told to the next one, and OpenAI's copy is deleted.
CREATE OR REPLACE FUNCTION forget_thread(p_user text) RETURNS void LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM oa_threads_map WHERE user_phone = p_user RETURNING thread_id)
    INSERT INTO discarded_threads (thread_id) SELECT thread_id FROM gone ON CONFLICT DO NOTHING;
    UPDATE users SET seed_after = coalesce((SELECT max(id) FROM messages WHERE user_phone = p_user), 0)
        WHERE user_phone = p_user;
$$;

-- Catálogo de cursos
-- Fin del catálogo

INSERT INTO hilo VALUES ('schema_version', '1') ON CONFLICT (key) DO UPDATE SET value = excluded.value;
