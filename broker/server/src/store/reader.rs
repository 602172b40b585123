//! The thread that reads: messages that Sessions want back.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use tracing::error;
use wasmqtt_protocol::ports::{Load, Loaded, StoreError};
use wasmqtt_protocol::router::{MessageId, SessionId};
use wasmqtt_protocol::session::Kept;

use super::Lines;
use super::database::{Database, column};
use super::rows::{Family, MessageRow};

pub(super) fn run(database: &Database, lines: &Lines, loads: &Receiver<(usize, Load)>) {
    for (shard, load) in loads {
        let messages = read(database, &load).unwrap_or_else(|why| {
            // They stay in the store, and are there again after a restart.
            error!(error = %why, "store cannot be read; messages wait");
            Vec::new()
        });
        let loaded = Loaded { key: load.key, turn: load.turn, messages };
        lines.line(shard).loaded.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(loaded);
        lines.wake(shard);
    }
}

fn read(database: &Database, load: &Load) -> Result<Vec<(MessageId, Option<Kept>)>, StoreError> {
    let held = database.held();
    let Some(db) = held.db() else { return Err(database.wrong("it cannot be opened")) };
    let messages = column(db, Family::Message)?;
    let keys: Vec<[u8; 8]> = load.ids.iter().map(|id| id.get().to_be_bytes()).collect();
    let rows = db.batched_multi_get_cf(&messages, &keys, keys.is_sorted());
    let rows = load.ids.iter().zip(rows).map(|(id, row)| {
        let row = row.map_err(|error| database.wrong(error.as_ref()))?;
        let kept = row.and_then(|row| {
            let kept = kept(&row, load.session);
            if kept.is_none() {
                error!(message = id.get(), session = load.session.get(), "store: a damaged message is left out");
            }
            kept
        });
        Ok((*id, kept))
    });
    rows.collect()
}

/// The message as that Session wanted it.
fn kept(row: &[u8], session: SessionId) -> Option<Kept> {
    let row = MessageRow::parse(row)?;
    let sealed = row.sealed();
    let (receivers, _, message) = row.receivers()?;
    let to = receivers.into_iter().find(|to| to.session == session)?;
    Some(Kept { message: Arc::new(message), sealed, qos: to.qos, retain: to.retain, ids: to.ids })
}
