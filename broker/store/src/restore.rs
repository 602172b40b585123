//! Everything that was kept, read once when the broker starts.

use std::collections::{BTreeMap, VecDeque};

use hashbrown::{HashMap, HashSet};
use rocksdb::{DBIteratorWithThreadMode, IteratorMode, ReadOptions};
use tracing::warn;
use wasmqtt_protocol::ports::{Restore, RestoredSession, StoreError, time_of};
use wasmqtt_protocol::router::{MessageId, SessionId};
use wasmqtt_protocol::session::Parked;
use wasmqtt_protocol::topic::Filter;

use super::Lines;
use super::batch::Batch;
use super::database::{Database, Db, column};
use super::rows::{self, Family, MessageRow, Take};

/// What the writer must know.
#[derive(Default)]
pub(super) struct Found {
    /// Messages for several Sessions: how many of these still need each.
    pub(super) counts: BTreeMap<u64, u32>,
    /// Messages that are gone, while rows still say who had them.
    pub(super) gone: Vec<u64>,
    /// Deletes rows that belong to nothing.
    pub(super) orphans: Batch,
    pub(super) last_session: u64,
    pub(super) last_message: u64,
}

/// Key and value.
type Pair = (Box<[u8]>, Box<[u8]>);
type Queues = HashMap<SessionId, Vec<Parked>, foldhash::fast::RandomState>;
type Handshake = (u16, Option<(MessageId, wasmqtt_protocol::codec::Qos)>);

/// Rows that belong to Sessions, in the order of these.
struct Rows<'a> {
    family: Family,
    rest: DBIteratorWithThreadMode<'a, Db>,
    next: Option<Pair>,
}

impl<'a> Rows<'a> {
    fn new(database: &Database, db: &'a Db, family: Family) -> Result<Self, StoreError> {
        let column = column(db, family)?;
        let mut rows = Self { family, rest: db.iterator_cf_opt(&column, once(), IteratorMode::Start), next: None };
        rows.step(database)?;
        Ok(rows)
    }

    fn step(&mut self, database: &Database) -> Result<Option<Pair>, StoreError> {
        let next = self.rest.next().transpose().map_err(|error| database.wrong(error.as_ref()))?;
        Ok(std::mem::replace(&mut self.next, next))
    }

    /// Gives those of one Session to `take`, without the Session in the key; those of Sessions that are gone are skipped.
    fn of(
        &mut self,
        database: &Database,
        session: SessionId,
        mut take: impl FnMut(&[u8], &[u8]) -> Option<()>,
    ) -> Result<(), StoreError> {
        while let Some((key, _)) = &self.next {
            let owner = Take(key).u64().unwrap_or(0);
            if owner > session.get() {
                return Ok(());
            }
            let Some((key, row)) = self.step(database)? else { return Ok(()) };
            if owner == session.get() && take(&key[8..], &row).is_none() {
                damaged(self.family, &key);
            }
        }
        Ok(())
    }
}

/// What is read once need not push anything out of the cache.
fn once() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    options
}

fn damaged(family: Family, key: &[u8]) {
    warn!(family = family.name(), key = ?key.escape_ascii().to_string(), "store: a damaged row is left out");
}

/// Reads everything.
pub(super) fn restore(database: &Database, lines: &Lines, to: &mut dyn Restore) -> Result<Found, StoreError> {
    let held = database.held();
    let Some(db) = held.db() else { return Err(database.wrong("it is not open")) };
    let mut found = Found::default();
    let sessions = session_ids(database, db, &mut found)?;
    let mut queues = queues(database, db, lines, &sessions, &mut found)?;
    drop(sessions);
    restore_sessions(database, db, lines, &mut queues, to)?;
    for row in rows(database, db, Family::Retained)? {
        let (topic, row) = row?;
        let Some(rows::RetainedRow { mut message, sealed, stamp, written_ms }) = rows::take_retained(&topic, &row)
        else {
            damaged(Family::Retained, &topic);
            continue;
        };
        message.expires_at_ms = message.expires_at_ms.map(|at| lines.corrected(written_ms, at));
        to.retained(message, sealed, stamp);
    }
    restore_feed(database, db, lines, to, &mut found)?;
    for row in rows(database, db, Family::Ban)? {
        let (key, row) = row?;
        match rows::take_ban(&key, &row) {
            Some(row) => to.ban(row.pattern, lines.corrected(row.written_ms, row.until_ms), &row.note),
            None => damaged(Family::Ban, &key),
        }
    }
    let Found { gone, counts, .. } = &mut found;
    gone.retain(|id| !counts.contains_key(id));
    Ok(found)
}

pub(super) fn rows<'a>(
    database: &'a Database,
    db: &'a Db,
    family: Family,
) -> Result<impl Iterator<Item = Result<Pair, StoreError>> + use<'a>, StoreError> {
    let column = column(db, family)?;
    let rows = db.iterator_cf_opt(&column, once(), IteratorMode::Start);
    Ok(rows.map(|row| row.map_err(|error| database.wrong(error.as_ref()))))
}

fn session_ids(database: &Database, db: &Db, found: &mut Found) -> Result<HashSet<u64>, StoreError> {
    let mut ids = HashSet::new();
    for row in rows(database, db, Family::Session)? {
        let (key, _) = row?;
        let id = Take(&key).u64().unwrap_or(0);
        found.last_session = found.last_session.max(id);
        ids.insert(id);
    }
    Ok(ids)
}

/// What waits for each Session, oldest first. Messages that nobody waits for are deleted.
fn queues(
    database: &Database,
    db: &Db,
    lines: &Lines,
    sessions: &HashSet<u64>,
    found: &mut Found,
) -> Result<Queues, StoreError> {
    let mut done = DoneRows { rest: rows(database, db, Family::Done)?, next: None };
    done.step(&mut found.gone)?;
    let mut queues = Queues::default();
    for row in rows(database, db, Family::Message)? {
        let (key, row) = row?;
        let parsed = Take(&key).id().zip(MessageRow::parse(&row));
        let Some((id, row)) = parsed else {
            damaged(Family::Message, &key);
            continue;
        };
        found.last_message = found.last_message.max(id.get());
        let expires_at_ms = row.expires_at_ms().map(|at| lines.corrected(time_of(id.get()), at));
        let total = row.receivers;
        let Some(rows::Receivers { to: receivers, bytes, .. }) = row.receivers() else {
            damaged(Family::Message, &key);
            continue;
        };
        let have_it = done.of(id.get(), &mut found.gone)?;
        let waits = |session: u64| sessions.contains(&session) && !have_it.contains(&session);
        let mut left = 0;
        for to in receivers.iter().filter(|to| waits(to.session.get())) {
            left += 1;
            queues.entry(to.session).or_default().push(Parked::new(id, bytes, expires_at_ms));
        }
        match left {
            0 => found.orphans.delete_row(Family::Message, &key),
            left if total > 1 => drop(found.counts.insert(id.get(), left)),
            _ => {}
        }
    }
    // The rest is of no message of this family.
    done.of(u64::MAX, &mut found.gone)?;
    Ok(queues)
}

/// Who has which message, in their order.
struct DoneRows<I> {
    rest: I,
    next: Option<(u64, u64)>,
}

impl<I: Iterator<Item = Result<Pair, StoreError>>> DoneRows<I> {
    fn step(&mut self, seen: &mut Vec<u64>) -> Result<(), StoreError> {
        self.next = match self.rest.next().transpose()? {
            Some((key, _)) => {
                let mut key = Take(&key);
                Some((key.u64().unwrap_or(0), key.u64().unwrap_or(0)))
            }
            None => None,
        };
        if let Some((message, _)) = self.next
            && seen.last() != Some(&message)
        {
            seen.push(message);
        }
        Ok(())
    }

    /// Who has this message; rows of messages before it are passed over. `seen`: all messages that there are rows of.
    fn of(&mut self, id: u64, seen: &mut Vec<u64>) -> Result<HashSet<u64>, StoreError> {
        let mut have_it = HashSet::new();
        while let Some((message, receiver)) = self.next.filter(|(message, _)| *message <= id) {
            if message == id {
                have_it.insert(receiver);
            }
            self.step(seen)?;
        }
        Ok(have_it)
    }
}

/// Messages that plugins have not taken. Those that nobody wants any more are deleted.
fn restore_feed(
    database: &Database,
    db: &Db,
    lines: &Lines,
    to: &mut dyn Restore,
    found: &mut Found,
) -> Result<(), StoreError> {
    let done = column(db, Family::Done)?;
    for row in rows(database, db, Family::Feed)? {
        let (key, row) = row?;
        let Some((id, row)) = Take(&key).id().zip(rows::take_feed(&row)) else {
            damaged(Family::Feed, &key);
            continue;
        };
        found.last_message = found.last_message.max(id.get());
        let rows::FeedRow { client, mut message, sealed, plugins } = row;
        message.expires_at_ms = message.expires_at_ms.map(|at| lines.corrected(time_of(id.get()), at));
        let mut left = 0;
        for plugin in &plugins {
            let done_key = [&key[..], &rows::plugin_number(plugin).to_be_bytes()].concat();
            let has_it = db.get_pinned_cf(&done, done_key).map_err(|error| database.wrong(error.as_ref()))?;
            if has_it.is_none() && to.fed(plugin, id, client.clone(), message.clone(), sealed) {
                left += 1;
            }
        }
        match left {
            0 => found.orphans.delete_row(Family::Feed, &key),
            left if plugins.len() > 1 => drop(found.counts.insert(id.get(), left)),
            _ => {}
        }
    }
    Ok(())
}

fn restore_sessions(
    database: &Database,
    db: &Db,
    lines: &Lines,
    queues: &mut Queues,
    to: &mut dyn Restore,
) -> Result<(), StoreError> {
    let mut subscription_rows = Rows::new(database, db, Family::Subscription)?;
    let mut replay_rows = Rows::new(database, db, Family::Replay)?;
    let mut inflight_rows = Rows::new(database, db, Family::Inflight)?;
    let mut received_rows = Rows::new(database, db, Family::Received)?;
    for row in rows(database, db, Family::Session)? {
        let (key, row) = row?;
        let Some((session, row)) = Take(&key).id().zip(rows::take_session(&row)) else {
            damaged(Family::Session, &key);
            continue;
        };
        let mut subscriptions = Vec::new();
        subscription_rows.of(database, session, |key, row| {
            let filter = Filter::parse(std::str::from_utf8(key).ok()?).ok()?;
            subscriptions.push((filter, rows::take_subscription(row)?));
            Some(())
        })?;
        let mut replays = Vec::new();
        replay_rows.of(database, session, |key, row| {
            let filter = Filter::parse(std::str::from_utf8(key).ok()?).ok()?;
            replays.push((filter, rows::take_replay(row)?));
            Some(())
        })?;
        let mut inflight: Vec<Handshake> = Vec::new();
        inflight_rows.of(database, session, |key, row| {
            inflight.push((Take(key).u16()?, rows::take_inflight(row)?.message()));
            Some(())
        })?;
        let mut received = Vec::new();
        received_rows.of(database, session, |key, _| {
            received.push(Take(key).u16()?);
            Some(())
        })?;
        let sent: HashSet<MessageId> = inflight.iter().filter_map(|(_, message)| message.map(|(id, _)| id)).collect();
        let mut parked: VecDeque<Parked> = queues.remove(&session).unwrap_or_default().into();
        if !sent.is_empty() {
            parked.retain(|parked| !sent.contains(&parked.id));
        }
        let rows::SessionRow { client, expiry, closed_at_ms, will, written_ms } = row;
        let closed_at_ms = closed_at_ms.map(|at| lines.corrected(written_ms, at));
        to.session(RestoredSession {
            session,
            client,
            expiry,
            closed_at_ms,
            will,
            subscriptions,
            replays,
            parked: parked.into(),
            inflight,
            received,
        });
    }
    Ok(())
}
