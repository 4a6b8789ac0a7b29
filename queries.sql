-- Hilo's statements, by name. One statement is one transaction.
--
-- Whatever moves a run carries its id and its attempt (the fencing token): a worker that lost the lease touches no
-- row. Conditions that another transaction may change meanwhile stand in a CASE of the SET list, where they are judged
-- on the row as it is once locked; in a WHERE beside a join they would be judged on an old snapshot.

-- name: receive
SELECT * FROM receive_messages(:messages::jsonb, :patience)

-- name: claim
WITH c AS MATERIALIZED (
    SELECT id, held FROM (SELECT id, held FROM runs WHERE state <> 'done' AND due_at <= now()
        ORDER BY due_at LIMIT 100 FOR NO KEY UPDATE SKIP LOCKED) x -- a few, as the planner has to know
    LIMIT (SELECT :n::int)) -- one plan for any number; only those that come out here are locked
UPDATE runs r SET held = true, attempt = r.attempt + 1, crashes = CASE WHEN c.held THEN r.crashes + 1 ELSE 0 END,
    due_at = now() + :lease::float8 * interval '1 s'
FROM c, users u WHERE r.id = c.id AND u.user_phone = r.user_phone
RETURNING r.id, r.user_phone, r.state, r.attempt, r.wakes, r.crashes, r.assistant, r.thread_id, r.response_id, r.creating,
    r.rounds, r.tries, u.profile_name, u.own_number, u.mode, u.language, extract(epoch FROM r.deadline - now())::float8 AS "left",
    CASE WHEN r.state = 'waiting' THEN (SELECT jsonb_agg(x ORDER BY x.id) FROM (SELECT id, sid, user_phone, body, raw, reply, at
        FROM messages m WHERE m.run_id = r.id AND m.direction = 'in') x) END AS turn

-- name: next_due
SELECT extract(epoch FROM min(due_at) - now())::float8 AS seconds FROM runs WHERE state <> 'done'

-- name: take
-- The turn's messages: those waiting, and those taken before a crash.
WITH r AS (
    SELECT id, user_phone FROM runs WHERE id = :id AND attempt = :a AND state = 'queued' FOR NO KEY UPDATE),
t AS (
    UPDATE messages m SET run_id = (SELECT id FROM r)
    WHERE m.user_phone = (SELECT user_phone FROM r) AND m.direction = 'in' AND m.run_id IS NULL RETURNING m.*),
u AS (
    UPDATE runs SET pending = pending - (SELECT count(*) FROM t), started_at = coalesce(started_at, now()),
        deadline = coalesce(deadline, now() + :timeout::float8 * interval '1 s')
    WHERE id = (SELECT id FROM r) RETURNING deadline)
SELECT x.id, x.sid, x.user_phone, x.body, x.raw, x.opt, x.input, x.reply, x.at,
    extract(epoch FROM (SELECT deadline FROM u) - now())::float8 AS "left",
    (SELECT thread_id FROM oa_threads_map o WHERE o.user_phone = x.user_phone) AS thread_id,
    (SELECT seed_after FROM users v WHERE v.user_phone = x.user_phone) AS seed_after,
    (SELECT true FROM messages o WHERE o.user_phone = x.user_phone AND o.run_id <> :id LIMIT 1) AS told,
    (SELECT written_at FROM runs o WHERE o.user_phone = x.user_phone AND o.id < :id AND o.outcome IN ('answered', 'fallback')
        ORDER BY o.id DESC LIMIT 1) AS answered_at
FROM (SELECT * FROM t UNION ALL SELECT m.* FROM messages m WHERE m.run_id = (SELECT id FROM r) AND m.direction = 'in') x
ORDER BY x.id

-- name: save_reply
UPDATE messages SET reply = :reply::jsonb WHERE id = :id RETURNING id

-- name: save_input
UPDATE messages SET input = :input::jsonb WHERE id = :id RETURNING id

-- name: standing
-- What a plugin may have changed: who answers, and which conversation goes on from where.
SELECT mode, seed_after, (SELECT thread_id FROM oa_threads_map o WHERE o.user_phone = u.user_phone) AS thread_id
FROM users u WHERE user_phone = :u

-- name: own_mode
-- The run that answers an opt-out word still sends its reply.
UPDATE users SET mode_run = :run WHERE user_phone = :u RETURNING mode

-- name: renew
UPDATE runs SET due_at = now() + :lease::float8 * interval '1 s'
WHERE id = :id AND attempt = :a AND state <> 'done' RETURNING id

-- name: save_thread
-- As begin_create, with a new conversation. One that was made for a run which somebody else has now, or which was
-- forgotten, is deleted at OpenAI.
WITH r AS (
    UPDATE runs SET creating = true, thread_id = :thread, assistant = :assistant,
        due_at = now() + :lease::float8 * interval '1 s'
    WHERE id = :id AND attempt = :a AND state IN ('queued', 'waiting') RETURNING user_phone),
k AS (INSERT INTO discarded_threads (thread_id) SELECT :thread WHERE NOT EXISTS (SELECT FROM r) ON CONFLICT DO NOTHING)
INSERT INTO oa_threads_map (user_phone, thread_id) SELECT user_phone, :thread FROM r
ON CONFLICT (user_phone) DO UPDATE SET thread_id = excluded.thread_id, created_at = now(), last_used_at = now()
RETURNING thread_id

-- name: history
-- What was said before a run, newest first: taken messages, and parts that left (or may have). Of an advisor it is only
-- what the assistant was asked and answered: the rest is about users, or for them.
SELECT m.direction, m.body, m.input, m.raw, m.media_url, m.sid, m.user_phone, m.at
FROM messages m JOIN users u USING (user_phone)
WHERE m.user_phone = :u AND m.id > u.seed_after AND m.run_id >= u.seed_run AND m.run_id IS DISTINCT FROM :run::bigint
    AND (m.direction = 'in' AND m.run_id IS NOT NULL OR m.state IN ('sending', 'sent', 'delivered', 'read'))
    AND (:u <> ALL(:advisors::text[]) AND u.reply_to <> ALL(:advisors) OR m.direction = 'in' AND m.reply IS NULL
        OR m.direction = 'out' AND (SELECT r.outcome FROM runs r WHERE r.id = m.run_id AND r.user_phone = m.user_phone)
            IN ('answered', 'fallback'))
ORDER BY m.id DESC LIMIT :n

-- name: begin_create
UPDATE runs SET creating = true, thread_id = :thread, assistant = :assistant,
    due_at = now() + :lease::float8 * interval '1 s'
WHERE id = :id AND attempt = :a AND state IN ('queued', 'waiting') RETURNING id

-- name: keep
UPDATE runs SET due_at = now() + :lease::float8 * interval '1 s'
WHERE id = :id AND attempt = :a AND held AND (creating OR :reading) RETURNING id

-- name: save_response
WITH w AS (
    INSERT INTO responses (id, run_id, model) SELECT :resp, id, :model FROM runs WHERE id = :id AND attempt = :a
    ON CONFLICT (id) DO UPDATE SET run_id = excluded.run_id, model = excluded.model RETURNING ended_at),
t AS (
    UPDATE oa_threads_map SET last_used_at = now(), assistant_id = :assistant WHERE user_phone = :u AND thread_id = :thread)
UPDATE runs r SET state = 'waiting', response_id = :resp, creating = false, rounds = :rounds::int,
    held = :held, due_at = CASE WHEN :held THEN r.due_at
        WHEN w.ended_at IS NULL THEN least(now() + :net::float8 * interval '1 s', r.deadline) ELSE now() END
FROM w WHERE r.id = :id AND r.attempt = :a RETURNING extract(epoch FROM r.due_at - now())::float8 AS seconds

-- name: note_response
UPDATE responses SET ended_at = coalesce(ended_at, now()), status = :status, input_tokens = :i::int,
    output_tokens = :o::int
WHERE id = :resp RETURNING id

-- name: wake_by_response
-- The run that waits for this response is due; with a lease it is claimed in the same breath, for a worker that is free.
WITH w AS (
    INSERT INTO responses (id, ended_at) VALUES (:resp, now())
    ON CONFLICT (id) DO UPDATE SET ended_at = coalesce(responses.ended_at, now()) RETURNING run_id),
o AS MATERIALIZED (
    SELECT r.id, NOT r.held AND r.state = 'waiting' AND r.response_id IS NOT DISTINCT FROM :resp AS due,
        NOT r.held AND r.state = 'waiting' AND r.response_id IS NOT DISTINCT FROM :resp AND :lease::float8 IS NOT NULL AS ours
    FROM w JOIN runs r ON r.id = w.run_id WHERE r.state <> 'done' FOR NO KEY UPDATE OF r)
UPDATE runs r SET wakes = r.wakes + 1, held = r.held OR o.ours, attempt = r.attempt + o.ours::int,
    crashes = CASE WHEN o.ours THEN 0 ELSE r.crashes END,
    due_at = CASE WHEN o.due THEN now() + coalesce(:lease::float8, 0) * interval '1 s' ELSE r.due_at END
FROM o, users u WHERE r.id = o.id AND u.user_phone = r.user_phone
RETURNING o.due, o.ours, r.id, r.user_phone, r.state, r.attempt, r.wakes, r.crashes, r.assistant, r.thread_id, r.response_id, r.creating,
    r.rounds, r.tries, u.profile_name, u.own_number, u.mode, u.language, extract(epoch FROM r.deadline - now())::float8 AS "left",
    CASE WHEN o.ours THEN (SELECT jsonb_agg(x ORDER BY x.id) FROM (SELECT id, sid, user_phone, body, raw, reply, at
        FROM messages m WHERE m.run_id = r.id AND m.direction = 'in') x) END AS turn

-- name: put_down
UPDATE runs SET held = false, creating = :creating::boolean, tries = tries + :tries::int,
    failures = with_failure(failures, :failure),
    due_at = CASE WHEN wakes <> :seen::int THEN now()
        WHEN state <> 'sending' AND deadline IS NOT NULL
            THEN least(now() + :seconds::float8 * interval '1 s', greatest(deadline, now()))
        ELSE now() + :seconds::float8 * interval '1 s' END
WHERE id = :id AND attempt = :a RETURNING extract(epoch FROM due_at - now())::float8 AS seconds

-- name: rotate
-- The conversation that is left is deleted at OpenAI, once nothing can be under way on it any more.
WITH r AS (
    UPDATE runs SET state = 'queued', response_id = NULL, creating = false, tries = tries + 1,
        failures = with_failure(failures, :failure)
    WHERE id = :id AND attempt = :a AND state IN ('queued', 'waiting') RETURNING user_phone),
d AS (DELETE FROM oa_threads_map WHERE user_phone = (SELECT user_phone FROM r) RETURNING thread_id),
k AS (INSERT INTO discarded_threads SELECT thread_id, now() + interval '1 hour' FROM d ON CONFLICT DO NOTHING)
SELECT 1 AS done FROM r

-- name: begin_calls
-- Records how the response ended and that its calls begin; tells which an earlier worker had begun, with their outputs.
WITH e AS (
    UPDATE responses SET ended_at = coalesce(ended_at, now()), status = :status, input_tokens = :i::int,
        output_tokens = :o::int WHERE id = :resp RETURNING 1),
r AS (
    UPDATE runs SET due_at = now() + :lease::float8 * interval '1 s'
    WHERE id = :id AND attempt = :a AND state = 'waiting'
        AND (SELECT count(*) FROM e) >= 0 -- first the response, then the run: the order in which webhooks lock them
    RETURNING id),
i AS (
    INSERT INTO tool_calls (call_id, run_id, response_id, name, arguments)
    SELECT x.call_id, r.id, :resp, x.name, x.arguments
    FROM r, jsonb_to_recordset(:calls::jsonb) AS x (call_id text, name text, arguments text) ON CONFLICT DO NOTHING)
SELECT (SELECT jsonb_object_agg(t.call_id, t.output IS NOT NULL) FROM tool_calls t WHERE t.call_id = ANY(:ids)) AS known
FROM r

-- name: save_output
UPDATE tool_calls SET output = :output, ok = :ok, milliseconds = :ms::int WHERE call_id = :id AND output IS NULL
RETURNING call_id

-- name: outputs
SELECT call_id, output FROM tool_calls WHERE call_id = ANY(:ids)

-- name: calls_of_run
SELECT call_id, name, arguments, output FROM tool_calls WHERE run_id = :id ORDER BY started_at, call_id

-- name: write
-- The reply's parts become rows; with leave, no thread is left behind for the next turn. How the response ended is noted.
-- Where the first part may leave at once it is in state sending already, and returned as next_part returns it.
WITH e AS (
    UPDATE responses SET ended_at = coalesce(ended_at, now()), status = :status, input_tokens = :i::int,
        output_tokens = :o::int WHERE id = :resp RETURNING 1),
r AS (
    UPDATE runs SET state = 'sending', outcome = :outcome, reason = :reason, written_at = now(), creating = false,
        failures = with_failure(failures, :failure), due_at = now() + :lease::float8 * interval '1 s'
    WHERE id = :id AND attempt = :a AND state IN ('queued', 'waiting')
        AND (SELECT count(*) FROM e) >= 0 -- first the response, then the run: the order in which webhooks lock them
    RETURNING id, user_phone),
d AS (DELETE FROM oa_threads_map WHERE :leave AND user_phone = (SELECT user_phone FROM r) RETURNING thread_id),
k AS (INSERT INTO discarded_threads SELECT thread_id, now() + interval '1 hour' FROM d ON CONFLICT DO NOTHING),
x AS (
    SELECT r.id AS run, r.user_phone AS run_user, coalesce(x."to", r.user_phone) AS user_phone, coalesce(x.text, '') AS body,
        x.media_url, x.content_sid, x.variables, x.ordinality
    FROM r, ROWS FROM (jsonb_to_recordset(:parts::jsonb)
        AS (text text, media_url text, content_sid text, variables jsonb, "to" text)) WITH ORDINALITY x),
n AS MATERIALIZED ( -- the first part, unless a tool or a hook has put one before it
    SELECT coalesce(u.reply_to, x.user_phone) AS address, coalesce(u.mode, 'bot') AS mode, u.own_number,
        u.last_in_at < now() - interval '24 hours' AS late, may_send(x.user_phone, x.run, x.run_user) AS may
    FROM x LEFT JOIN users u ON u.user_phone = x.user_phone
    WHERE x.ordinality = 1 AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.run_id = x.run AND m.direction = 'out')),
p AS (
    INSERT INTO messages (user_phone, direction, body, run_id, media_url, content_sid, variables, state, sending_at, sent_to, sends)
    SELECT x.user_phone, 'out', x.body, x.run, x.media_url, x.content_sid, x.variables, CASE WHEN n.may THEN 'sending' ELSE 'queued' END,
        CASE WHEN n.may THEN now() END, CASE WHEN n.may THEN n.address END, coalesce(n.may, false)::int
    FROM x LEFT JOIN n ON x.ordinality = 1 ORDER BY x.ordinality RETURNING *)
SELECT r.id AS run, p.id, p.user_phone, n.address, n.mode, n.own_number, n.late, NULL::float8 AS hold_for,
    p.state, p.body, p.media_url, p.content_sid, p.variables, p.sending_at, p.sends
FROM r LEFT JOIN p ON p.state = 'sending' LEFT JOIN n ON true

-- name: queue_part
-- Only where the run is open. A part that it has already is not queued again: a tool or a hook may run a second time
-- after a crash. Raises wakes: a run that ends at this moment counts its parts again.
WITH r AS (UPDATE runs SET wakes = wakes + 1 WHERE id = :run AND state <> 'done' RETURNING id),
x AS (SELECT :to::text AS user_phone, :text::text AS body, r.id AS run_id, :media::text AS media_url,
    :content::text AS content_sid, :variables::jsonb AS variables FROM r),
i AS (
    INSERT INTO messages (user_phone, direction, body, run_id, state, media_url, content_sid, variables)
    SELECT user_phone, 'out', body, run_id, 'queued', media_url, content_sid, variables FROM x
    WHERE NOT EXISTS (SELECT 1 FROM messages m WHERE m.run_id = x.run_id AND m.direction = 'out'
        AND (m.user_phone, m.body) = (x.user_phone, x.body)
        AND (m.media_url, m.content_sid, m.variables) IS NOT DISTINCT FROM (x.media_url, x.content_sid, x.variables)))
SELECT id FROM r

-- name: next_part
-- Moves the next part to sending, or to withheld where its user left the assistant meanwhile. A part whose
-- predecessor has not left Twilio yet waits for that callback, two seconds at most: hold_for.
WITH r AS (
    UPDATE runs SET due_at = now() + :lease::float8 * interval '1 s'
    WHERE id = :id AND attempt = :a AND state = 'sending' RETURNING id, user_phone),
n AS (
    SELECT m.id, m.user_phone, coalesce(u.reply_to, m.user_phone) AS address, coalesce(u.mode, 'bot') AS mode,
        u.own_number, u.last_in_at < now() - interval '24 hours' AS late, r.id AS run, r.user_phone AS run_user,
        (SELECT extract(epoch FROM p.sending_at + interval '2 s' - now())::float8 FROM messages p
            WHERE p.run_id = r.id AND p.direction = 'out' AND p.user_phone = m.user_phone AND p.id < m.id
            AND p.state = 'sent' AND NOT p.confirmed ORDER BY p.id DESC LIMIT 1) AS hold_for
    FROM r JOIN messages m ON m.run_id = r.id AND m.direction = 'out' AND m.state = 'queued'
    LEFT JOIN users u ON u.user_phone = m.user_phone ORDER BY m.id LIMIT 1),
s AS (
    UPDATE messages m SET state = CASE WHEN may_send(n.user_phone, n.run, n.run_user) THEN 'sending' ELSE 'withheld' END,
        sending_at = now(), sent_to = n.address, sends = m.sends + 1, updated_at = now()
    FROM n WHERE m.id = n.id AND m.state = 'queued' AND coalesce(n.hold_for, 0) <= 0 RETURNING m.*)
SELECT r.id AS run, n.id, n.user_phone, n.address, n.mode, n.own_number, n.late,
    CASE WHEN n.hold_for > 0 THEN n.hold_for END AS hold_for,
    s.state, s.body, s.media_url, s.content_sid, s.variables, s.sending_at, s.sends
FROM r LEFT JOIN n ON true LEFT JOIN s ON s.id = n.id

-- name: not_sent
-- Certainly not sent: it goes again, for a day at most; unless a callback has told more meanwhile.
WITH r AS (SELECT id, created_at FROM runs WHERE id = :id AND attempt = :a FOR NO KEY UPDATE)
UPDATE messages m SET updated_at = now(),
    state = CASE WHEN m.state <> 'sending' THEN m.state
        WHEN r.created_at < now() - :long::float8 * interval '1 s' THEN 'failed' ELSE 'queued' END
FROM r WHERE m.id = :part RETURNING m.state

-- name: refused
UPDATE messages SET state = 'failed', error_code = :code::int, updated_at = now()
WHERE run_id = :run AND direction = 'out' AND user_phone = :u AND id >= :part AND state IN ('queued', 'sending')
RETURNING id

-- name: in_doubt
SELECT m.*, coalesce(m.sent_to, u.reply_to, m.user_phone) AS address, extract(epoch FROM now() - m.sending_at)::float8 AS age
FROM messages m LEFT JOIN users u USING (user_phone)
WHERE m.run_id = :id AND m.direction = 'out' AND m.state = 'sending' ORDER BY m.id LIMIT 1

-- name: known_sids
SELECT sid FROM messages WHERE sid = ANY(:sids)

-- name: part_status
-- A status callback: the row is found by the id in its URL, else by the sid; states only ever rise.
WITH o AS (
    SELECT id, state, confirmed FROM messages
    WHERE id = coalesce(:id::bigint, (SELECT id FROM messages WHERE sid = :sid)) AND direction = 'out' FOR NO KEY UPDATE),
m AS (
    UPDATE messages m SET state = CASE WHEN state_rank(:state) > state_rank(o.state) THEN :state ELSE o.state END,
        sid = coalesce(m.sid, :sid), confirmed = o.confirmed OR :gone, error_code = coalesce(:code::int, m.error_code), updated_at = now()
    FROM o WHERE m.id = o.id
    RETURNING m.id, m.run_id, m.user_phone, m.state, m.error_code, m.content_sid, m.state <> o.state AS changed,
        :gone AND NOT o.confirmed OR o.state = 'sending' OR :state IN ('failed', 'undelivered') AS eased),
        -- eased: what the run may have waited for, or has to count
w AS (
    UPDATE runs r SET wakes = r.wakes + m.eased::int,
        due_at = CASE WHEN r.held OR r.state <> 'sending' OR NOT m.eased THEN r.due_at ELSE now() END,
        outcome = CASE WHEN r.state = 'done' THEN 'undelivered' ELSE r.outcome END, -- it may end at this moment
        reason = CASE WHEN r.state = 'done' THEN m.error_code::text ELSE r.reason END
    FROM m WHERE r.id = m.run_id AND (r.state <> 'done' OR m.state IN ('failed', 'undelivered'))
    RETURNING r.state = 'done' AS done, m.eased AND NOT r.held AS eased)
SELECT m.run_id, m.user_phone, m.state, m.error_code, m.content_sid, m.changed,
    coalesce(w.done, true) AS done, w.eased AND NOT w.done AS wake
FROM m LEFT JOIN w ON true

-- name: window
-- Who a part is for that the 24-hour window kept away, and the advisor who wrote it, if one did.
SELECT coalesce(u.profile_name, '') AS name,
    :u = ANY(:advisors::text[]) OR coalesce(u.reply_to = ANY(:advisors), false) AS advisor,
    CASE WHEN r.user_phone <> :u AND (r.user_phone = ANY(:advisors) OR w.reply_to = ANY(:advisors)) THEN r.user_phone END AS writer
FROM runs r JOIN users w USING (user_phone) LEFT JOIN users u ON u.user_phone = :u WHERE r.id = :run

-- name: remedy_run
-- A run with the parts that stand in for those of another, which came too late for the 24-hour window; what that one has
-- said already is not said again. A user with an open run has just written, so the window is open and the reply to that
-- will do; an advisor who never wrote is no user.
WITH x AS (
    SELECT coalesce(x.text, '') AS text, x.content_sid, x."to", x.ordinality
    FROM ROWS FROM (jsonb_to_recordset(:parts::jsonb) AS (text text, content_sid text, "to" text)) WITH ORDINALITY x
    WHERE NOT EXISTS (SELECT 1 FROM messages m WHERE m.run_id = :run AND m.direction = 'out'
        AND (m.user_phone, m.body) = (x."to", coalesce(x.text, '')) AND m.content_sid IS NOT DISTINCT FROM x.content_sid)),
l AS MATERIALIZED ( -- first the user, then the run: the order in which a message locks them
    SELECT user_phone FROM users WHERE user_phone = :u AND mode <> 'out' AND EXISTS (SELECT 1 FROM x) FOR NO KEY UPDATE),
r AS (
    INSERT INTO runs (user_phone, state, due_at, outcome, started_at, written_at)
    SELECT user_phone, 'sending', now(), 'answered', now(), now() FROM l
    ON CONFLICT (user_phone) WHERE state <> 'done' DO NOTHING RETURNING id, user_phone),
o AS (UPDATE users u SET mode_run = r.id FROM r WHERE u.user_phone = r.user_phone AND u.mode = 'human') -- an advisor's word
INSERT INTO messages (user_phone, direction, body, run_id, state, content_sid)
SELECT x."to", 'out', x.text, r.id, 'queued', x.content_sid FROM r, x ORDER BY x.ordinality RETURNING run_id

-- name: finish
-- Ends a run that has no more parts to send, having noted that Twilio took one: that is a fact, so it needs no fence.
-- What arrived meanwhile becomes the next turn, a burst after the last message. Images and files that the model was
-- shown are in the conversation now: of them the transcript keeps the words. A callback at the same moment raises
-- wakes: then what was counted here may be old, the run is not touched, and the caller tries again.
WITH s AS (
    UPDATE messages SET sid = coalesce(sid, :sid), updated_at = now(),
        state = CASE WHEN state_rank(state) < state_rank('sent') THEN 'sent' ELSE state END
    WHERE id = :part::bigint RETURNING id, state, error_code),
p AS (
    SELECT (SELECT wakes FROM runs WHERE id = :id) AS seen, bool_or(state = 'queued') AS more,
        count(*) FILTER (WHERE state IN ('sent', 'delivered', 'read')) AS sent, max(error_code)::text AS code,
        CASE WHEN NOT bool_or(content_sid IS NOT NULL) THEN min(user_phone) FILTER (WHERE error_code = 63016) END AS shut,
        count(*) FILTER (WHERE state IN ('failed', 'undelivered'))
            * (NOT coalesce(bool_or(content_sid IS NOT NULL AND state IN ('sent', 'delivered', 'read')), false))::int AS lost
    FROM (SELECT coalesce(s.state, m.state) AS state, coalesce(s.error_code, m.error_code) AS error_code, content_sid, user_phone
        FROM messages m LEFT JOIN s USING (id) WHERE m.run_id = :id AND m.direction = 'out') parts),
f AS (
    UPDATE runs SET state = 'done', held = false, finished_at = now(),
        outcome = CASE WHEN p.lost > 0 THEN 'undelivered' ELSE coalesce(outcome, 'intercepted') END,
        reason = CASE WHEN p.lost > 0 THEN p.code ELSE reason END
    FROM p WHERE id = :id AND attempt = :a AND state <> 'done' AND wakes = p.seen AND p.more IS NOT TRUE
    RETURNING id, user_phone, pending, outcome, created_at, sent, shut),
k AS (
    UPDATE messages SET input = (SELECT to_jsonb(string_agg(part ->> 'text', chr(10)))
        FROM jsonb_array_elements(input) part WHERE part ->> 'text' IS NOT NULL)
    WHERE run_id = (SELECT id FROM f) AND direction = 'in' AND jsonb_typeof(input) = 'array'),
i AS (SELECT min(at) AS first_at FROM messages WHERE run_id = :id AND direction = 'in'),
n AS (
    INSERT INTO runs (user_phone, due_at, pending)
    SELECT user_phone, greatest(now(), (SELECT max(m.at) FROM messages m WHERE m.user_phone = f.user_phone
        AND m.direction = 'in' AND m.run_id IS NULL) + :burst::float8 * interval '1 s'), pending
    FROM f WHERE pending > 0 RETURNING due_at)
SELECT p.more, f.outcome, f.sent, f.shut, extract(epoch FROM now() - coalesce(i.first_at, f.created_at))::float8 AS seconds,
    (SELECT extract(epoch FROM due_at - now())::float8 FROM n) AS "next" FROM p CROSS JOIN i LEFT JOIN f ON true

-- name: open_runs
SELECT state, count(*) AS n, extract(epoch FROM now() - min(due_at) FILTER (WHERE due_at <= now()))::float8 AS late
FROM runs WHERE state <> 'done' GROUP BY state

-- name: discarded
-- Taken for ten minutes, so that no other process deletes the same.
UPDATE discarded_threads SET due_at = now() + interval '10 minutes' WHERE thread_id IN (
    SELECT thread_id FROM discarded_threads WHERE due_at <= now() ORDER BY due_at LIMIT 10 FOR UPDATE SKIP LOCKED)
RETURNING thread_id

-- name: discard_done
DELETE FROM discarded_threads WHERE thread_id = :thread RETURNING thread_id

-- name: discard_later
UPDATE discarded_threads SET attempts = attempts + 1,
    due_at = now() + least(3600, 10 * 2 ^ least(attempts, 10)) * interval '1 s'
WHERE thread_id = :thread RETURNING attempts

-- name: hand_back
-- Back to the assistant: where an advisor's time is up, or nobody could be told. Where no advisor has written, the user
-- learns it in a run of its own, once no other is open, and that run answers what was passed on to nobody. Of several
-- processes one does it: the others wait for the user's row, and find another mode in it.
WITH u AS MATERIALIZED (
    SELECT u.user_phone, u.mode_since AS since, coalesce(:texts::jsonb ->> u.language, :texts::jsonb ->> 'es') AS text, a.answered
    FROM users u, LATERAL (SELECT EXISTS (SELECT 1 FROM messages m JOIN runs r ON r.id = m.run_id
        WHERE m.user_phone = u.user_phone AND m.direction = 'out' AND m.at >= u.mode_since
            AND r.user_phone <> u.user_phone) AS answered) a
    WHERE u.mode = 'human' AND u.mode_until IS NOT NULL AND (u.mode_until <= now() OR NOT :webhook AND NOT a.answered AND (
        SELECT bool_and(m.state IN ('failed', 'undelivered', 'withheld')) FROM runs r JOIN messages m ON m.run_id = r.id
        WHERE r.user_phone = u.user_phone AND coalesce(r.finished_at, now()) >= u.mode_since
            AND m.direction = 'out' AND m.user_phone <> u.user_phone AND m.at >= u.mode_since))
    FOR NO KEY UPDATE OF u),
w AS MATERIALIZED (
    SELECT m.id, m.user_phone FROM u JOIN runs r USING (user_phone) JOIN messages m ON m.run_id = r.id
    WHERE NOT u.answered AND coalesce(r.finished_at, now()) >= u.since AND m.direction = 'in' AND m.opt IS NULL
        AND (m.reply IS NOT NULL AND NOT m.reply @? '$[*] ? (@.to == null)' OR m.reply IS NULL AND (
            SELECT o.id FROM messages o WHERE o.run_id = r.id AND o.direction = 'out' AND o.user_phone = u.user_phone
                AND o.state <> 'withheld' LIMIT 1) IS NULL)),
r AS (
    INSERT INTO runs (user_phone, state, due_at, pending)
    SELECT u.user_phone, CASE WHEN n.pending > 0 THEN 'queued' ELSE 'sending' END, now(), n.pending
    FROM u, LATERAL (SELECT count(*) AS pending FROM w WHERE w.user_phone = u.user_phone) n WHERE NOT u.answered
    ON CONFLICT (user_phone) WHERE state <> 'done' DO NOTHING RETURNING id, user_phone),
b AS (UPDATE messages m SET run_id = NULL, reply = NULL FROM w JOIN r USING (user_phone) WHERE m.id = w.id),
p AS (
    INSERT INTO messages (user_phone, direction, body, run_id, state)
    SELECT user_phone, 'out', u.text, r.id, 'queued' FROM r JOIN u USING (user_phone))
SELECT set_mode(u.user_phone, 'bot', NULL, NULL) AS mode, r.id IS NOT NULL AS told
FROM u LEFT JOIN r USING (user_phone) WHERE u.answered OR r.id IS NOT NULL

-- name: begin_now
-- While nobody has written, what Twilio has was for another program: the catch-up begins at this moment instead of one
-- that lies further back than so many seconds.
UPDATE hilo SET value = :now
WHERE key = 'caught_up_to' AND value::timestamptz < :now::timestamptz - :seconds::float8 * interval '1 s'
    AND NOT EXISTS (SELECT FROM users WHERE own_number > '')
RETURNING key

-- name: our_numbers
-- Those of several numbers that a user wrote to last.
SELECT n AS number FROM unnest(:numbers::text[]) n
WHERE (SELECT true FROM users WHERE own_number = n LIMIT 1) -- no EXISTS: it may be planned to read all users

-- name: take_turn
-- One process in so many seconds gets a row.
INSERT INTO hilo VALUES (:key, now()::text) ON CONFLICT (key) DO UPDATE SET value = excluded.value
    WHERE hilo.value::timestamptz < now() - :seconds::float8 * interval '1 s' RETURNING key

-- name: prune_messages
-- A window of rows after an id: those that are old and done go, but for the last twenty of each user, which a new
-- conversation is told. The window counts its old rows: where it has none, no later one has.
WITH w AS MATERIALIZED (SELECT id, user_phone, run_id, at < now() - :days::int * interval '1 day' AS old
    FROM messages WHERE id > :after ORDER BY id LIMIT :n),
gone AS (
    DELETE FROM messages m USING w WHERE m.id = w.id AND w.old
        AND NOT EXISTS (SELECT 1 FROM runs r WHERE r.id = w.run_id AND r.state <> 'done') AND w.run_id IS NOT NULL
        AND m.id < (SELECT min(k.id) FROM (SELECT id FROM messages WHERE user_phone = w.user_phone ORDER BY id DESC
            LIMIT 20) k)
    RETURNING m.id)
SELECT max(id) AS upto, count(*) FILTER (WHERE old) AS old, (SELECT count(*) FROM gone) AS gone FROM w

-- name: prune_runs
-- The same for runs whose messages are gone, and for the calls and responses of all old ones.
WITH w AS MATERIALIZED (SELECT id, state = 'done' AND finished_at < now() - :days::int * interval '1 day' AS old
    FROM runs WHERE id > :after ORDER BY id LIMIT :n),
calls AS (DELETE FROM tool_calls t USING w WHERE t.run_id = w.id AND w.old),
answers AS (DELETE FROM responses p USING w WHERE p.run_id = w.id AND w.old),
gone AS (
    DELETE FROM runs r USING w WHERE r.id = w.id AND w.old
        AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.run_id = r.id) RETURNING r.id)
SELECT max(id) AS upto, count(*) FILTER (WHERE old) AS old, (SELECT count(*) FROM gone) AS gone FROM w

-- name: prune_responses
-- Those of no run: another application's, told by the project's webhook, or cancelled by a worker that lost its lease.
WITH gone AS (DELETE FROM responses WHERE id IN (SELECT id FROM responses WHERE run_id IS NULL
    AND created_at < now() - :days::int * interval '1 day' ORDER BY created_at LIMIT :n) RETURNING 1)
SELECT :after::bigint AS upto, count(*) AS old, count(*) AS gone FROM gone

-- name: notify
-- To the other processes: there are due runs, and everybody here is busy.
SELECT pg_notify('hilo', :me)::text AS told

-- name: connections_allowed
-- How many connections this role may have at one time, in all processes.
SELECT least(nullif(r.rolconnlimit, -1), nullif(d.datconnlimit, -1),
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0)) AS n
FROM pg_roles r, pg_database d WHERE r.rolname = current_user AND d.datname = current_database()

-- name: get
SELECT value FROM hilo WHERE key = :key

-- name: facts
SELECT key, value FROM hilo WHERE key = ANY(:keys)

-- name: put
INSERT INTO hilo VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = excluded.value RETURNING key
