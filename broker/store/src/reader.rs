//! The thread that reads: messages that Sessions want back.
//!
//! It does not wait for the writer, unless a message is nowhere to be found: then it may still be on its way there.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};

use tracing::error;
use wasmqtt_protocol::ports::{Load, Loaded, StoreError, time_of};
use wasmqtt_protocol::router::{MessageId, SessionId};
use wasmqtt_protocol::session::Kept;

use super::Lines;
use super::database::{Database, column};
use super::held::Row;
use super::rows::{Family, MessageRow};

/// A load on its way to the reader.
pub(super) struct Wanted {
    pub(super) shard: usize,
    /// Batches that all shards had handed over before.
    pub(super) handed: u64,
    pub(super) load: Load,
}

type Found = (MessageId, Option<Kept>);

pub(super) fn run(database: &Database, lines: &Lines, loads: &Receiver<Option<Wanted>>) {
    while let Ok(Some(Wanted { shard, handed, load })) = loads.recv() {
        let messages = read(database, lines, &load).and_then(|messages| {
            if messages.iter().all(|(_, kept)| kept.is_some()) || !lines.await_settled(handed) {
                return Ok(messages);
            }
            read(database, lines, &load)
        });
        let messages = messages.unwrap_or_else(|why| {
            // They stay in the store, and are there again after a restart.
            error!(error = %why, "store cannot be read; messages wait");
            Vec::new()
        });
        lines.put_loaded(shard, Loaded { key: load.key, turn: load.turn, messages });
    }
}

fn read(database: &Database, lines: &Lines, load: &Load) -> Result<Vec<Found>, StoreError> {
    let mut found: Vec<Found> = load.ids.iter().map(|id| (*id, None)).collect();
    let mut missing = Vec::new();
    {
        // Before the database: what leaves here is there.
        let held = lines.held.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, id) in load.ids.iter().enumerate() {
            match held.get(Family::Message, &id.get().to_be_bytes()) {
                Row::Value(row) => found[place].1 = kept(lines, row, *id, load.session),
                Row::Gone => {}
                Row::Unknown => missing.push((place, id.get().to_be_bytes())),
            }
        }
    }
    if missing.is_empty() {
        return Ok(found);
    }
    let open = database.held();
    let Some(db) = open.db() else { return Err(database.wrong("it cannot be opened")) };
    let messages = column(db, Family::Message)?;
    let keys: Vec<[u8; 8]> = missing.iter().map(|(_, key)| *key).collect();
    let rows = db.batched_multi_get_cf(&messages, &keys, keys.is_sorted());
    for ((place, _), row) in missing.into_iter().zip(rows) {
        let row = row.map_err(|error| database.wrong(error.as_ref()))?;
        let id = load.ids[place];
        found[place].1 = row.and_then(|row| kept(lines, &row, id, load.session));
    }
    Ok(found)
}

/// The message as that Session wanted it.
fn kept(lines: &Lines, row: &[u8], id: MessageId, session: SessionId) -> Option<Kept> {
    let kept = MessageRow::parse(row).and_then(|row| {
        let sealed = row.sealed();
        let receivers = row.receivers()?;
        let to = receivers.to.into_iter().find(|to| to.session == session)?;
        let mut message = row.message(receivers.payload);
        message.expires_at_ms = message.expires_at_ms.map(|at| lines.corrected(time_of(id.get()), at));
        Some(Kept { message: Arc::new(message), sealed, qos: to.qos, retain: to.retain, ids: to.ids })
    });
    if kept.is_none() {
        error!(message = id.get(), session = session.get(), "store: a damaged message is left out");
    }
    kept
}
