-- version: 6
--
-- Hilo's tables. Safe to run again at every release, also by hand: psql "$DATABASE_URL" -f schema.sql
-- Raise the number above and at the end with every change, or processes that are running will not apply it; once a
-- version is released, a copy stays in tests/data/schemas/.

BEGIN; -- all or nothing
SET client_min_messages = warning;

DO $$ BEGIN PERFORM pg_advisory_xact_lock(4815162342); END $$; -- one at a time

DO $$ -- Is there another program's work in the way? `check` asks the same.
DECLARE
    theirs text;
BEGIN
    SELECT string_agg(CASE relname WHEN 'oa_threads_map' THEN 'oa_threads_map (no table with user_phone and thread_id)'
            ELSE relname END, ', ' ORDER BY relname) INTO theirs
        FROM pg_class, LATERAL (SELECT relkind = 'r' AND array_agg(attname::text) @> '{user_phone, thread_id}'
            FROM pg_attribute WHERE attrelid = pg_class.oid AND NOT attisdropped) AS a (map)
        WHERE relnamespace = current_schema()::regnamespace AND (relname = 'oa_threads_map' AND NOT map OR relname IN ('hilo',
            'users', 'addresses', 'runs', 'messages', 'responses', 'tool_calls', 'discarded_threads', 'cursos',
            'cursos_vocabulario'));
    IF theirs IS NOT NULL AND 2 <> (SELECT count(*) FROM pg_attribute
            WHERE attrelid = to_regclass('hilo') AND attname IN ('key', 'value')) THEN
        RAISE EXCEPTION 'another program has tables of these names here: %. Give Hilo another database or another schema '
            '(CREATE SCHEMA hilo, and DATABASE_URL=…?options=-csearch_path%%3Dhilo)', theirs
            USING ERRCODE = 'duplicate_table';
    END IF;
END $$;

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
    language         text,                       -- of the latest text that showed one: es, en, pt
    mode             text NOT NULL DEFAULT 'bot' CHECK (mode IN (
                         'bot',                  -- the assistant answers
                         'human',                -- an advisor answers; the assistant is silent
                         'out')),                -- the user wants no messages
    mode_since       timestamptz,
    mode_until       timestamptz,                -- human: when the assistant takes over again; out: when it would have
    mode_run         bigint,                     -- the run that caused the mode: it alone still sends its reply
    seed_after       bigint NOT NULL DEFAULT 0,  -- messages up to this id are not told to a new conversation
    created_at       timestamptz NOT NULL DEFAULT now(),
    last_in_at       timestamptz                 -- the 24-hour window is open from here
);
ALTER TABLE users ADD COLUMN IF NOT EXISTS opt_at timestamptz; -- when the latest word to leave or to return was written
ALTER TABLE users ADD COLUMN IF NOT EXISTS seed_run bigint NOT NULL DEFAULT 0; -- nor what belongs to a run before this one
DROP INDEX IF EXISTS users_with_advisor;
CREATE INDEX IF NOT EXISTS users_by_mode_until ON users (mode_until) WHERE mode_until IS NOT NULL;
CREATE INDEX IF NOT EXISTS users_by_own_number ON users (own_number);

-- Other addresses of a person than the one that the row in users is named by: WhatsApp shows a number or a username.
CREATE TABLE IF NOT EXISTS addresses (
    address    text PRIMARY KEY,
    user_phone text NOT NULL REFERENCES users ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS addresses_of_user ON addresses (user_phone);

-- One OpenAI conversation a user. Deleting a row is always a safe repair: the next turn makes a new
-- conversation and tells it the last messages of the transcript.
CREATE TABLE IF NOT EXISTS oa_threads_map (
    user_phone   text PRIMARY KEY,
    thread_id    text NOT NULL
);
-- Another program may have made the table, with the same two columns. It keeps its rows, and gives up what would refuse
-- ours: several rows a user (the latest stays, the others move to oa_threads_map_older), narrow types, checks, columns
-- that only the other program fills.
DO $$
DECLARE
    c record;
BEGIN
    IF EXISTS (SELECT FROM oa_threads_map WHERE user_phone IS NOT NULL GROUP BY user_phone HAVING count(*) > 1) THEN
        CREATE TABLE IF NOT EXISTS oa_threads_map_older (LIKE oa_threads_map);
        WITH ranked AS (
            SELECT ctid, row_number() OVER (PARTITION BY user_phone ORDER BY coalesce(to_jsonb(t) ->> 'last_used_at',
                to_jsonb(t) ->> 'updated_at', to_jsonb(t) ->> 'created_at') DESC NULLS LAST, ctid DESC) AS place
            FROM oa_threads_map t WHERE user_phone IS NOT NULL),
        moved AS (
            DELETE FROM oa_threads_map t USING ranked r WHERE t.ctid = r.ctid AND r.place > 1 RETURNING t.*)
        INSERT INTO oa_threads_map_older SELECT * FROM moved;
    END IF;
    FOR c IN SELECT conname FROM pg_constraint WHERE conrelid = 'oa_threads_map'::regclass AND contype IN ('c', 'f') LOOP
        EXECUTE format('ALTER TABLE oa_threads_map DROP CONSTRAINT %I', c.conname);
    END LOOP;
    FOR c IN
        SELECT attname AS name, format_type(atttypid, atttypmod) AS type,
            attnotnull AND NOT atthasdef AND attidentity = '' AS demanding, (
                SELECT conname FROM pg_constraint WHERE conrelid = attrelid AND contype = 'p' AND attnum = ANY (conkey)) AS key
        FROM pg_attribute WHERE attrelid = 'oa_threads_map'::regclass AND attnum > 0 AND NOT attisdropped
    LOOP
        IF c.name IN ('user_phone', 'thread_id', 'assistant_id') AND c.type NOT IN ('text', 'character varying') THEN
            EXECUTE format('ALTER TABLE oa_threads_map ALTER %I TYPE text', c.name);
        ELSIF c.name IN ('created_at', 'last_used_at') AND c.type IN ('timestamp without time zone', 'date') THEN
            EXECUTE format('ALTER TABLE oa_threads_map ALTER %1$I DROP DEFAULT,
                ALTER %1$I TYPE timestamptz USING %1$I::timestamp AT TIME ZONE %2$L', c.name, 'UTC');
        ELSIF c.name IN ('created_at', 'last_used_at') AND c.type <> 'timestamp with time zone' THEN
            EXECUTE format('ALTER TABLE oa_threads_map ALTER %I DROP NOT NULL', c.name);
            EXECUTE format('ALTER TABLE oa_threads_map RENAME %I TO %I', c.name, c.name || '_before');
        ELSIF c.demanding AND c.name NOT IN ('user_phone', 'thread_id', 'created_at', 'last_used_at') THEN
            IF c.key IS NOT NULL THEN
                EXECUTE format('ALTER TABLE oa_threads_map DROP CONSTRAINT IF EXISTS %I', c.key);
            END IF;
            EXECUTE format('ALTER TABLE oa_threads_map ALTER %I DROP NOT NULL', c.name);
        END IF;
    END LOOP;
END $$;
ALTER TABLE oa_threads_map ADD COLUMN IF NOT EXISTS assistant_id text;
ALTER TABLE oa_threads_map ADD COLUMN IF NOT EXISTS created_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE oa_threads_map ADD COLUMN IF NOT EXISTS last_used_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE oa_threads_map ALTER created_at SET DEFAULT now(), ALTER last_used_at SET DEFAULT now();
ALTER TABLE oa_threads_map ALTER assistant_id DROP NOT NULL;
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
ALTER TABLE runs ADD COLUMN IF NOT EXISTS failures jsonb; -- what OpenAI failed with, ten times at most: [{"at", "code"}]
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
ALTER TABLE messages ADD COLUMN IF NOT EXISTS sent_to text; -- out: the address that it was handed to Twilio for
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

-- A run's failures with one more, of which nothing but the code is kept; the first ten tell what there is to know.
CREATE OR REPLACE FUNCTION with_failure(failures jsonb, p_code text) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_code IS NULL OR jsonb_array_length(failures) >= 10 THEN failures
        ELSE coalesce(failures, '[]') || jsonb_build_object('at', now(), 'code', p_code) END
$$;

-- Callbacks come out of order: a state only ever gives way to a higher one.
CREATE OR REPLACE FUNCTION state_rank(state text) RETURNS int LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE state WHEN 'queued' THEN 0 WHEN 'sending' THEN 1 WHEN 'sent' THEN 2 WHEN 'withheld' THEN 3
        WHEN 'failed' THEN 3 WHEN 'undelivered' THEN 3 WHEN 'delivered' THEN 4 WHEN 'read' THEN 5 END
$$;

-- Leave a user's conversation: the next turn begins a new one, which is told the transcript. OpenAI's copy is deleted
-- once nothing can be under way on it any more.
CREATE OR REPLACE FUNCTION leave_thread(p_user text) RETURNS void LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM oa_threads_map WHERE user_phone = p_user RETURNING thread_id)
    INSERT INTO discarded_threads (thread_id, due_at) SELECT thread_id, now() + interval '1 hour' FROM gone
        ON CONFLICT DO NOTHING;
$$;

-- Make one person of two rows: what `p_other` said and was told becomes part of `p_user`'s transcript, who keeps the
-- stricter of both modes. The conversation is left, so that the next one is told of both. Put off while the other
-- still has a run of its own; a row with another ExternalUserId is another person, who had the number before.
CREATE OR REPLACE FUNCTION absorb_user(p_other text, p_user text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    other users;
BEGIN
    SELECT * INTO other FROM users WHERE user_phone = p_other FOR UPDATE;
    IF other.user_phone IS NULL OR EXISTS (SELECT 1 FROM runs WHERE user_phone = p_other AND state <> 'done')
        OR other.external_user_id IS DISTINCT FROM (SELECT external_user_id FROM users WHERE user_phone = p_user)
            AND 'whatsapp:' || other.external_user_id <> p_other THEN
        RETURN;
    END IF;
    UPDATE messages SET user_phone = p_user WHERE user_phone = p_other;
    UPDATE runs SET user_phone = p_user WHERE user_phone = p_other;
    UPDATE addresses SET user_phone = p_user WHERE user_phone = p_other;
    PERFORM leave_thread(p_other), leave_thread(p_user);
    DELETE FROM users WHERE user_phone = p_other;
    UPDATE users u SET created_at = least(u.created_at, other.created_at), language = coalesce(u.language, other.language),
        profile_name = coalesce(nullif(u.profile_name, ''), other.profile_name),
        seed_after = greatest(u.seed_after, other.seed_after), seed_run = greatest(u.seed_run, other.seed_run),
        (mode, mode_since, mode_until, mode_run) = (SELECT x.mode, x.mode_since, x.mode_until, x.mode_run
            FROM (VALUES (u.mode, u.mode_since, u.mode_until, u.mode_run),
                (other.mode, other.mode_since, other.mode_until, other.mode_run)) x (mode, mode_since, mode_until, mode_run)
            ORDER BY array_position(ARRAY['out', 'human', 'bot'], x.mode) LIMIT 1)
        WHERE u.user_phone = p_user;
END $$;

-- The row that a message belongs to: the person's by ExternalUserId, else by an address seen before, else a new one.
-- Of several first messages of one person at a time, whatever address each comes from, one makes the row.
CREATE OR REPLACE FUNCTION whose_message(p_from text, p_external text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    who text;
BEGIN
    IF p_external IS NOT NULL THEN
        who := (SELECT user_phone FROM users WHERE external_user_id = p_external);
        IF who IS NULL THEN
            PERFORM pg_advisory_xact_lock(hashtextextended('hilo.users ' || p_external, 0));
            who := (SELECT user_phone FROM users WHERE external_user_id = p_external);
        END IF;
    END IF;
    RETURN coalesce(who, (SELECT user_phone FROM addresses WHERE address = p_from), p_from);
END $$;

-- Store an inbound message and make or refresh its user's run; no row where the sid is known already.
-- The user's row is locked first, so ids grow in the order of commits for each user.
DROP FUNCTION IF EXISTS receive_message(text, text, text, text, text, text, jsonb, text, double precision, timestamptz);
CREATE OR REPLACE FUNCTION receive_message(
    p_sid text, p_from text, p_to text, p_external text, p_profile text, p_body text, p_raw jsonb, p_opt text,
    p_burst double precision, p_at timestamptz, p_language text DEFAULT NULL
) RETURNS TABLE (id bigint, held boolean, seconds double precision) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    -- A username without an ExternalUserId stands for one, until Twilio tells it.
    handle text := substring(p_from FROM '^whatsapp:([^+].*)');
    who text;
    was text;
    external text;
    message_id bigint;
BEGIN
    IF EXISTS (SELECT 1 FROM messages WHERE sid = p_sid) THEN
        RETURN; -- delivered again: what is newer of the user stays
    END IF;
    who := whose_message(p_from, coalesce(p_external, handle));
    INSERT INTO users AS u (user_phone, external_user_id, reply_to, own_number, profile_name, last_in_at, language)
        VALUES (who, coalesce(p_external, handle), p_from, p_to, p_profile, p_at, p_language)
        ON CONFLICT (user_phone) DO UPDATE SET
            reply_to = excluded.reply_to, own_number = excluded.own_number, last_in_at = greatest(u.last_in_at, p_at),
            profile_name = coalesce(nullif(excluded.profile_name, ''), u.profile_name),
            language = coalesce(excluded.language, u.language)
        RETURNING u.mode, u.external_user_id INTO was, external;
    -- By itself, and only where it changes: setting a unique column locks the row against the foreign key of the next
    -- run that `finish` makes, which holds the run that is wanted here.
    IF external IS DISTINCT FROM coalesce(p_external, external, handle) THEN
        IF 'whatsapp:' || external <> who
            AND NOT EXISTS (SELECT FROM addresses WHERE user_phone = who AND address = 'whatsapp:' || external) THEN
            PERFORM forget_thread(who); -- the number has come to somebody new, who is not told what was said before
            UPDATE users SET profile_name = p_profile, language = p_language, mode = 'bot', mode_since = NULL,
                mode_until = NULL, mode_run = NULL WHERE user_phone = who;
            was := 'bot';
        END IF;
        UPDATE users SET external_user_id = coalesce(p_external, external, handle) WHERE user_phone = who;
    END IF;
    IF who <> p_from THEN
        IF NOT EXISTS (SELECT 1 FROM addresses WHERE address = p_from AND user_phone = who) THEN
            INSERT INTO addresses VALUES (p_from, who) ON CONFLICT (address) DO UPDATE SET user_phone = excluded.user_phone;
        END IF;
        IF EXISTS (SELECT 1 FROM users WHERE user_phone = p_from) THEN
            PERFORM absorb_user(p_from, who);
            was := (SELECT mode FROM users WHERE user_phone = who);
        END IF;
    ELSIF p_external IS NOT NULL THEN
        DELETE FROM addresses WHERE address = p_from; -- the number has come to another person, or back
    END IF;
    IF p_opt IS NOT NULL THEN
        IF p_at < (SELECT opt_at FROM users WHERE user_phone = who) THEN
            p_opt := NULL; -- it was missed, and the user has said otherwise since
        ELSE
            UPDATE users SET opt_at = p_at WHERE user_phone = who;
        END IF;
    END IF;
    IF p_opt = 'in' AND was <> 'out' THEN
        p_opt := NULL; -- the word to return means something else to a user who never left
    END IF;
    INSERT INTO messages (sid, user_phone, direction, body, raw, opt, at)
        VALUES (p_sid, who, 'in', p_body, p_raw, p_opt, p_at) ON CONFLICT (sid) DO NOTHING RETURNING id INTO message_id;
    IF message_id IS NULL THEN
        RETURN;
    END IF;
    IF p_opt IS NOT NULL THEN -- from here on a run under way sends nothing more; the one that takes this message will
        UPDATE users u SET mode = CASE p_opt WHEN 'out' THEN 'out' ELSE 'bot' END, mode_run = NULL,
            mode_since = CASE WHEN p_opt = 'out' AND u.mode_until IS NOT NULL THEN u.mode_since ELSE now() END,
            mode_until = CASE p_opt WHEN 'out' THEN u.mode_until END WHERE u.user_phone = who;
    END IF;
    RETURN QUERY INSERT INTO runs AS r (user_phone, due_at, pending) VALUES (who, now() + p_burst * interval '1 s', 1)
        ON CONFLICT (user_phone) WHERE state <> 'done' DO UPDATE SET
            pending = r.pending + 1, wakes = r.wakes + 1,
            due_at = CASE WHEN r.held OR r.state <> 'queued' OR r.tries > 0 THEN r.due_at
                ELSE least(excluded.due_at, r.created_at + 5 * greatest(p_burst, 0.2) * interval '1 s') END
        RETURNING r.id, r.held, extract(epoch FROM r.due_at - now())::float8;
END $$;

-- Store several messages, in their order; a row for each that is new, with its place. What is known of a user's language
-- comes before a guess. A lock is waited for no longer than `p_patience`. Where each is of somebody else, and of nobody who
-- has another address or leaves or returns, one statement does what receive_message does for each.
CREATE OR REPLACE FUNCTION receive_messages(p_messages jsonb, p_patience text)
RETURNS TABLE (place bigint, id bigint, held boolean, seconds double precision) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    m record;
BEGIN
    PERFORM set_config('lock_timeout', p_patience, true);
    IF (SELECT count(DISTINCT x.sender) = count(*) AND bool_and(x.external IS NULL AND x.opt IS NULL
                AND x.sender LIKE 'whatsapp:+%' AND (SELECT address FROM addresses WHERE address = x.sender) IS NULL)
            FROM jsonb_to_recordset(p_messages) AS x (sender text, external text, opt text)) THEN
        RETURN QUERY WITH m AS MATERIALIZED (
            SELECT x.*, coalesce(x.at, now()) AS moment
            FROM ROWS FROM (jsonb_to_recordset(p_messages) AS (sid text, sender text, own text, profile text, body text,
                    raw jsonb, burst double precision, at timestamptz, language text, guess text))
                WITH ORDINALITY x (sid, sender, own, profile, body, raw, burst, at, language, guess, place)
            WHERE (SELECT k.id FROM messages k WHERE k.sid = x.sid) IS NULL), -- no EXISTS: it may be planned to read them all
        w AS ( -- first the users, in their order
            INSERT INTO users AS u (user_phone, reply_to, own_number, profile_name, last_in_at, language)
            SELECT m.sender, m.sender, m.own, m.profile, m.moment,
                coalesce(m.language, (SELECT k.language FROM users k WHERE k.user_phone = m.sender), m.guess)
            FROM m ORDER BY m.place
            ON CONFLICT (user_phone) DO UPDATE SET
                reply_to = excluded.reply_to, own_number = excluded.own_number,
                last_in_at = greatest(u.last_in_at, excluded.last_in_at),
                profile_name = coalesce(nullif(excluded.profile_name, ''), u.profile_name),
                language = coalesce(excluded.language, u.language)
            RETURNING u.user_phone),
        i AS (
            INSERT INTO messages (sid, user_phone, direction, body, raw, at)
            SELECT m.sid, m.sender, 'in', m.body, m.raw, m.moment FROM m JOIN w ON w.user_phone = m.sender ORDER BY m.place
            ON CONFLICT (sid) DO NOTHING RETURNING user_phone),
        r AS (
            INSERT INTO runs AS r (user_phone, due_at, pending)
            SELECT m.sender, now() + m.burst * interval '1 s', 1 FROM m JOIN i ON i.user_phone = m.sender ORDER BY m.place
            ON CONFLICT (user_phone) WHERE state <> 'done' DO UPDATE SET
                pending = r.pending + 1, wakes = r.wakes + 1,
                due_at = CASE WHEN r.held OR r.state <> 'queued' OR r.tries > 0 THEN r.due_at
                    ELSE least(excluded.due_at, r.created_at + 5 * greatest(excluded.due_at - now(), interval '0.2 s')) END
            RETURNING r.id, r.user_phone, r.held, r.due_at)
        SELECT m.place, r.id, r.held, extract(epoch FROM r.due_at - now())::float8 FROM m JOIN r ON r.user_phone = m.sender;
        RETURN;
    END IF;
    FOR m IN SELECT * FROM ROWS FROM (jsonb_to_recordset(p_messages) AS (sid text, sender text, own text, external text,
            profile text, body text, raw jsonb, opt text, burst double precision, at timestamptz, language text, guess text))
            WITH ORDINALITY x (sid, sender, own, external, profile, body, raw, opt, burst, at, language, guess, place)
        ORDER BY place
    LOOP -- each sees what the one before it has written
        RETURN QUERY SELECT m.place, r.id, r.held, r.seconds
            FROM receive_message(m.sid, m.sender, m.own, m.external, m.profile, m.body, m.raw, m.opt, m.burst,
                coalesce(m.at, now()),
                coalesce(m.language, (SELECT language FROM users WHERE user_phone = m.sender), m.guess)) r;
    END LOOP;
END $$;

-- Whether a part may leave: not to a user who opted out, nor past an advisor, but for the run that caused it. VOLATILE,
-- so that it sees the mode as it is now, not as it was when the statement that calls it began to wait for a lock.
CREATE OR REPLACE FUNCTION may_send(p_to text, p_run bigint, p_user text) RETURNS boolean LANGUAGE sql VOLATILE AS $$
    SELECT coalesce((SELECT u.mode = 'bot' OR u.mode_run IS NOT DISTINCT FROM p_run OR p_to <> p_user AND u.mode <> 'out'
        FROM users u WHERE u.user_phone = p_to), true)
$$;

-- Leave a user's conversation for good: nothing said up to now, or up to one message of the turn, is told to the next
-- one, and OpenAI's copy is deleted. An answer to what came before that message may have been written after it came.
DROP FUNCTION IF EXISTS forget_thread(text);
CREATE OR REPLACE FUNCTION forget_thread(p_user text, p_sid text DEFAULT NULL) RETURNS void LANGUAGE sql AS $$
    WITH gone AS (DELETE FROM oa_threads_map WHERE user_phone = p_user RETURNING thread_id)
    INSERT INTO discarded_threads (thread_id) SELECT thread_id FROM gone ON CONFLICT DO NOTHING;
    UPDATE users SET seed_run = coalesce((SELECT run_id FROM messages WHERE sid = p_sid), seed_run),
        seed_after = greatest(seed_after, (SELECT id FROM messages WHERE sid = p_sid),
        CASE WHEN p_sid IS NULL THEN (SELECT max(id) FROM messages WHERE user_phone = p_user) END)
        WHERE user_phone = p_user;
$$;

-- Begin to forget users, before what is kept of them elsewhere is removed: a worker that holds one of their runs loses it
-- here, and may write nothing more. Whoever writes from here on is a newcomer, with messages and runs above these numbers
-- and a last_in_at again.
CREATE OR REPLACE FUNCTION begin_forgetting(p_who text[], OUT last_message bigint, OUT last_run bigint) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM users WHERE user_phone = ANY (p_who) ORDER BY user_phone FOR NO KEY UPDATE; -- as a message that comes in does
    LOOP -- a run that ends meanwhile may leave another one
        UPDATE runs SET state = 'done', held = false, attempt = attempt + 1, finished_at = now(), reason = 'forgotten',
            outcome = coalesce(outcome, 'intercepted') WHERE user_phone = ANY (p_who) AND state <> 'done';
        EXIT WHEN NOT FOUND;
    END LOOP;
    last_message := (SELECT coalesce(max(id), 0) FROM messages);
    last_run := (SELECT coalesce(max(id), 0) FROM runs);
    UPDATE users SET last_in_at = NULL, profile_name = '', language = NULL, seed_after = last_message
        WHERE user_phone = ANY (p_who);
END $$;

-- Who answers a user: 'bot', 'human' until a moment, or nobody ('out'). `p_run` is the run that causes it, which alone
-- still sends its reply. Back to 'bot', the next turn begins a new conversation, which is told what was said meanwhile.
-- A user who wants no messages stays so, whoever asks: only their own word brings them back. NULL where it was not done.
CREATE OR REPLACE FUNCTION set_mode(p_user text, p_mode text, p_run bigint, p_until timestamptz)
RETURNS text LANGUAGE sql AS $$
    SELECT leave_thread(p_user) WHERE p_mode = 'bot';
    UPDATE users SET mode = p_mode, mode_since = now(), mode_until = p_until, mode_run = p_run
        WHERE user_phone = p_user AND (mode <> 'out' OR p_mode = 'out')
        RETURNING mode;
$$;

-- Catálogo de cursos
-- Se busca sin acentos (unaccent) y perdonando errores (pg_trgm); las dos extensiones puede crearlas el dueño de la base.
-- Las funciones con cuerpo RETURN quedan atadas aquí y ahora a las funciones que usan: no dependen del search_path de
-- quien busca, ni del de una restauración.
CREATE EXTENSION IF NOT EXISTS unaccent;
CREATE EXTENSION IF NOT EXISTS pg_trgm;
DO $$ BEGIN -- estén en el esquema que estén (en Heroku, heroku_ext), lo que sigue las encuentra
    PERFORM set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(nspname)), false)
        FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace
        WHERE extname IN ('unaccent', 'pg_trgm') AND nspname <> ALL (current_schemas(true)) GROUP BY nspname;
END $$;

-- Minúsculas sin acentos, con un espacio entre palabras. Primero unaccent: con un locale C, lower() no conoce la Í.
CREATE OR REPLACE FUNCTION cursos_plano(texto text) RETURNS text LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN btrim(regexp_replace(
    replace(replace(lower(unaccent(texto)), 'c++', 'cpp'), 'c#', 'csharp'), '[^a-z0-9]+', ' ', 'g'));

-- Cómo suena: "exel" y "excel" dan "eksel"; "abansado" y "avanzado", "abansado". Se lee de dentro hacia fuera.
CREATE OR REPLACE FUNCTION cursos_sonido(texto text) RETURNS text LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN regexp_replace(                                   -- letras dobles, una
    translate(                                           -- b = v, c = k = q, s = z, i = y; la h es muda
    regexp_replace(regexp_replace(regexp_replace(regexp_replace(
    replace(replace(replace(replace(regexp_replace(cursos_plano(texto),
        'll\M', 'l', 'g'), 'pho', 'fo'), 'x', 'ks'), 'ch', 'x'), 'll', 'y'),
        's?c(?=[eiy])', 's', 'g'), 'g(?=[eiy])', 'j', 'g'), '([gq])u(?=[ei])', '\1', 'g'), 'n(?=[bpv])', 'm', 'g'),
        'cqzvwyh', 'kksbui'),
        '([a-hj-z])\1+', '\1', 'g');

-- Sonidos sin terminación, género ni número: "diseño", "diseñar" y "diseñadora" comparten raíz.
CREATE OR REPLACE FUNCTION cursos_raices(sonido text) RETURNS text LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN regexp_replace(regexp_replace(sonido,
    '([a-z]{4})(abilidad(es)?|idad(es)?|[ai]?sion(es)?|[ai]mientos?|[aei]dor(as?|es)?|[ai]?ndo|[ai]bles?|ajes?|istas?'
    '|(ad)?eri?[ao]s?|ias?|[aei]r([mts]e|l[ao]s?)?)\M', '\1', 'g'),
    '([a-z]{3})([aeo]s|[aeos])\M', '\1', 'g');

-- Lo que se busca de un curso, con su peso: A el nombre, B los temas, C el contenido y el área, D el resto.
CREATE OR REPLACE FUNCTION cursos_indice(nombre text, temas text, contenido text, resto text) RETURNS tsvector
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN setweight(to_tsvector('pg_catalog.simple', cursos_sonido(nombre) || ' ' || cursos_raices(cursos_sonido(nombre))), 'A')
    || setweight(to_tsvector('pg_catalog.simple', cursos_sonido(temas) || ' ' || cursos_raices(cursos_sonido(temas))), 'B')
    || setweight(to_tsvector('pg_catalog.simple', cursos_raices(cursos_sonido(contenido))), 'C')
    || setweight(to_tsvector('pg_catalog.simple', cursos_raices(cursos_sonido(resto))), 'D');

CREATE TABLE IF NOT EXISTS cursos (
    codigo         text PRIMARY KEY CHECK (codigo ~ '[A-Za-z0-9]'),
    nombre         text NOT NULL CHECK (nombre ~ '\S'),
    area           text NOT NULL DEFAULT '',
    nivel          text NOT NULL CHECK (nivel IN ('basico', 'intermedio', 'avanzado')),
    descripcion    text NOT NULL DEFAULT '',
    temario        text NOT NULL DEFAULT '',
    requisitos     text NOT NULL DEFAULT '',
    precio         numeric(10, 2) CHECK (precio >= 0),      -- 0: gratis; null: a consultar
    moneda         text NOT NULL DEFAULT 'MXN' CHECK (moneda ~ '^[A-Z]{3}$'),
    duracion       text NOT NULL DEFAULT '',
    modalidad      text NOT NULL DEFAULT '',                -- en línea, presencial, híbrido…
    sede           text NOT NULL DEFAULT '',
    horario        text NOT NULL DEFAULT '',
    docente        text NOT NULL DEFAULT '',
    fechas_inicio  date[] NOT NULL DEFAULT '{}',            -- las pasadas no se muestran
    enlace         text NOT NULL DEFAULT '',
    palabras_clave text NOT NULL DEFAULT '',                -- cómo lo llama la gente: sinónimos, marcas
    activo         boolean NOT NULL DEFAULT true,           -- false: ni se encuentra ni se muestra
    -- Lo que sigue lo calcula la base, también para una fila escrita a mano.
    clave          text NOT NULL GENERATED ALWAYS AS (upper(replace(cursos_plano(codigo), ' ', ''))) STORED
);
DO $$ BEGIN -- antes, el área contaba como una palabra clave
    IF EXISTS (SELECT FROM pg_attrdef WHERE adrelid = 'cursos'::regclass
            AND pg_get_expr(adbin, adrelid) LIKE '%area || '' ''::text) || palabras_clave%') THEN
        ALTER TABLE cursos DROP COLUMN indice;
    END IF;
END $$;
ALTER TABLE cursos ADD COLUMN IF NOT EXISTS indice tsvector NOT NULL GENERATED ALWAYS AS (cursos_indice(
    nombre || ' codigo' || replace(cursos_plano(codigo), ' ', ''), palabras_clave,
    area || ' ' || temario || ' ' || docente || ' ' || sede || ' ' || modalidad || ' ' || horario, descripcion)) STORED;
-- "exc 101" y "EXC-101" son el mismo código.
CREATE UNIQUE INDEX IF NOT EXISTS cursos_clave ON cursos (clave);
CREATE INDEX IF NOT EXISTS cursos_por_indice ON cursos USING gin (indice) WITH (fastupdate = off);

-- Las palabras de nombres y temas, como suenan: entre ellas está la que quiso escribir quien escribió otra parecida.
-- Solo crece: una palabra que ya no usa ningún curso no encuentra ninguno.
CREATE TABLE IF NOT EXISTS cursos_vocabulario (palabra text PRIMARY KEY);
CREATE INDEX IF NOT EXISTS cursos_vocabulario_trigramas
    ON cursos_vocabulario USING gin (palabra gin_trgm_ops) WITH (fastupdate = off);

CREATE OR REPLACE FUNCTION cursos_anotar() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO cursos_vocabulario
        SELECT DISTINCT palabra
        FROM nuevos, string_to_table(cursos_sonido(nombre || ' ' || area || ' ' || palabras_clave), ' ') AS palabra
        WHERE length(palabra) >= 4 ORDER BY palabra -- en orden, y así dos cargas a la vez no se bloquean una a otra
        ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER cursos_anotar_nuevos AFTER INSERT ON cursos
    REFERENCING NEW TABLE AS nuevos FOR EACH STATEMENT EXECUTE FUNCTION cursos_anotar();
CREATE OR REPLACE TRIGGER cursos_anotar_cambios AFTER UPDATE ON cursos
    REFERENCING NEW TABLE AS nuevos FOR EACH STATEMENT EXECUTE FUNCTION cursos_anotar();

-- Los cursos activos que responden a unas palabras, con un puntaje de 0 a 1: qué parte de lo pedido tiene el curso, donde
-- cada palabra pesa más cuantos menos cursos la tienen. `palabras` son las que importan; `de_apoyo` (línea, sábados…) solo
-- ordenan. Si `estricto`, solo cursos de esos `niveles`; si no, los de otro nivel salen cuando no hay ninguno del pedido.
CREATE OR REPLACE FUNCTION cursos_buscar(palabras text[], de_apoyo text[], niveles text[], estricto boolean, minimo real)
RETURNS TABLE (codigo text, puntaje real) LANGUAGE plpgsql STABLE SET search_path FROM CURRENT SET jit = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY WITH dicha AS MATERIALIZED (
        SELECT cursos_sonido(x) AS suena, true AS importa FROM unnest(palabras) AS x
        UNION ALL
        SELECT cursos_sonido(x), false FROM unnest(de_apoyo) AS x
    ), forma AS MATERIALIZED (
        SELECT DISTINCT ON (raiz) raiz, suena, importa, suena || CASE WHEN length(suena) < 4 THEN ':' ELSE ':*' END AS comienza
        FROM dicha, LATERAL (SELECT cursos_raices(suena) OFFSET 0) AS r (raiz)
        WHERE suena ~ '^[a-z0-9]+$'
        ORDER BY raiz, importa DESC
    ), palabra AS MATERIALIZED (
        SELECT raiz,
            (CASE WHEN length(suena) > 1 THEN raiz || '|' || comienza ELSE suena || ':A' END)::tsquery AS donde_sea,
            (suena || ':A')::tsquery AS a1, (raiz || ':A')::tsquery AS a2, (comienza || 'A')::tsquery AS a3,
            (suena || ':B')::tsquery AS b1, (raiz || ':B')::tsquery AS b2, (comienza || 'B')::tsquery AS b3,
            (raiz || ':C')::tsquery AS c2
        FROM forma
    ), exacta AS MATERIALIZED (
        SELECT raiz, codigo, CASE
            WHEN indice @@ a1 THEN 1 WHEN indice @@ a2 THEN 0.95 WHEN indice @@ a3 THEN 0.8
            WHEN indice @@ b1 THEN 0.76 WHEN indice @@ b2 THEN 0.72 WHEN indice @@ b3 THEN 0.6
            WHEN indice @@ c2 THEN 0.35 ELSE 0.15 END AS parecido
        FROM palabra JOIN cursos ON activo AND indice @@ donde_sea
    ), parecida AS MATERIALIZED ( -- para una palabra que no está, las que se escriben casi igual
        SELECT raiz, parecido, (v.palabra || ':A')::tsquery AS a, (v.palabra || ':B')::tsquery AS b,
            (v.palabra || ':AB|' || cursos_raices(v.palabra) || ':C')::tsquery AS abc
        FROM forma, LATERAL (
            SELECT palabra, similarity(palabra, suena) AS parecido FROM cursos_vocabulario
            WHERE palabra % suena AND similarity(palabra, suena) >= 0.4 ORDER BY 2 DESC, 1 LIMIT 5) AS v
        WHERE importa AND length(suena) >= 4
            AND NOT EXISTS (SELECT FROM exacta e WHERE e.raiz = forma.raiz AND e.parecido > 0.5)
    ), acierto AS MATERIALIZED (
        SELECT raiz, codigo, max(parecido)::float AS parecido FROM (
            TABLE exacta
            UNION ALL
            SELECT raiz, codigo, parecido * CASE WHEN indice @@ a THEN 0.8 WHEN indice @@ b THEN 0.65 ELSE 0.3 END
            FROM parecida JOIN cursos ON activo AND indice @@ abc) AS todo
        GROUP BY raiz, codigo
    ), peso AS MATERIALIZED ( -- una palabra que ningún curso tiene pesa como si la tuvieran unos cuantos
        SELECT raiz, importa, CASE WHEN importa THEN 1 ELSE 0.1 END
            * ln(1 + total / (0.5 + coalesce(nullif(count(a.codigo), 0), sqrt(total)))) AS valor
        FROM forma CROSS JOIN (SELECT (SELECT count(*) FROM cursos) AS total) AS t LEFT JOIN acierto a USING (raiz)
        GROUP BY raiz, importa, total
    ), candidato AS (
        SELECT codigo, sum(valor * parecido) / (SELECT sum(valor) FROM peso) AS puntaje,
            max(parecido) FILTER (WHERE importa) AS mejor_palabra
        FROM acierto JOIN peso USING (raiz) GROUP BY codigo HAVING bool_or(importa)
    ), pedido AS (
        SELECT codigo, nivel = ANY (niveles) AS del_nivel, max(puntaje) OVER () AS mejor,
            puntaje * (1 - length(nombre) / 1000.0) AS puntaje -- a igual acierto, el nombre más corto
        FROM candidato JOIN cursos USING (codigo)
        WHERE (puntaje >= minimo OR mejor_palabra > 0.7) AND (NOT estricto OR nivel = ANY (niveles))
    ), cercano AS ( -- otro tema no gana por ser del nivel pedido: solo uno que acierta casi tanto como el mejor
        SELECT *, bool_or(del_nivel AND puntaje >= 0.7 * mejor) OVER () AS hay_del_nivel
        FROM pedido WHERE puntaje >= 0.5 * mejor
    )
    SELECT codigo, puntaje::real FROM cercano WHERE del_nivel OR hay_del_nivel IS NOT TRUE;
END $$;

-- Lo que se calculó con una versión anterior de estas funciones, o se escribió con los disparadores apagados, se calcula
-- de nuevo.
UPDATE cursos SET codigo = codigo;
-- Fin del catálogo

INSERT INTO hilo VALUES ('schema_version', '6') ON CONFLICT (key) DO UPDATE SET value = excluded.value;
COMMIT;
