//! What operators do with a store: look at it, check it, copy it, move it.

use std::io::{BufRead, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rocksdb::checkpoint::Checkpoint;
use rocksdb::{WriteBatch, WriteOptions};
use serde::{Deserialize, Serialize};
use wasmqtt_protocol::ports::{ClockRow, StoreError};

use super::database::{CLOCK_KEY, Database, Db, column, private_files};
use super::restore::rows;
use super::rows::{self, Family, MessageRow, Take};
use super::{Durability, RocksStore, StoreConfig};

/// Rows that are imported at a time.
const IMPORT_ROWS: usize = 10_000;

/// What is in one column family.
#[derive(Debug, Clone, Serialize)]
pub struct FamilyStats {
    /// Its name.
    pub family: &'static str,
    /// Rows in it.
    pub rows: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// Bytes of files on the disk.
    pub disk_bytes: u64,
}

/// A row that cannot be read, or belongs to nothing.
#[derive(Debug, Clone, Serialize)]
pub struct Damage {
    /// Column family.
    pub family: &'static str,
    /// The key, with everything unprintable escaped.
    pub key: String,
    /// What is wrong.
    pub why: &'static str,
}

/// One line of an export. Binary values are hexadecimal.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    family: String,
    key: String,
    value: String,
    /// For readers; not imported.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    about: Option<String>,
}

/// A store without a broker.
pub struct Offline(Database);

fn io(error: std::io::Error) -> StoreError {
    StoreError(error.to_string())
}

impl Offline {
    /// Opens an existing folder.
    ///
    /// # Errors
    /// There is none, a broker uses it, or it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.join("CURRENT").is_file() {
            return Err(StoreError(format!("store {}: there is none", path.display())));
        }
        Ok(Self(Database::open(&StoreConfig { durability: Durability::Fsync, ..StoreConfig::new(path) })?))
    }

    /// Makes a new one.
    ///
    /// # Errors
    /// There is one already, or it cannot be made.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        if path.join("CURRENT").exists() {
            return Err(StoreError(format!("store {}: there is one already", path.display())));
        }
        Ok(Self(Database::open(&StoreConfig::new(path))?))
    }

    fn with<T>(&self, work: impl FnOnce(&Database, &Db) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let held = self.0.held();
        let db = held.db().ok_or_else(|| self.0.wrong("it is not open"))?;
        work(&self.0, db)
    }

    /// Counts everything. `progress` is told of each family before it is read.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn stats(&self, mut progress: impl FnMut(&str)) -> Result<Vec<FamilyStats>, StoreError> {
        self.with(|database, db| {
            let mut stats = Vec::new();
            for family in Family::ALL {
                progress(family.name());
                let mut found = FamilyStats { family: family.name(), rows: 0, bytes: 0, disk_bytes: 0 };
                for row in rows(database, db, family)? {
                    let (key, value) = row?;
                    found.rows += 1;
                    found.bytes += (key.len() + value.len()) as u64;
                }
                let size = db.property_int_value_cf(&column(db, family)?, rocksdb::properties::LIVE_SST_FILES_SIZE);
                found.disk_bytes = size.ok().flatten().unwrap_or(0);
                stats.push(found);
            }
            Ok(stats)
        })
    }

    /// Reads every row, and says which are damaged; with `repair` these are deleted.
    ///
    /// # Errors
    /// Files are damaged so that rows cannot even be found, or it cannot be written.
    pub fn check(&self, repair: bool, mut progress: impl FnMut(&str)) -> Result<Vec<Damage>, StoreError> {
        self.with(|database, db| {
            let mut sessions = hashbrown::HashSet::new();
            let mut damage = Vec::new();
            for family in Family::ALL {
                progress(family.name());
                let mut deleted = WriteBatch::default();
                let of_family = column(db, family)?;
                for row in rows(database, db, family)? {
                    let (key, value) = row?;
                    if family == Family::Session {
                        sessions.insert(Take(&key).u64().unwrap_or(0));
                    }
                    let Some(why) = fault(family, &key, &value, &sessions) else { continue };
                    damage.push(Damage { family: family.name(), key: key.escape_ascii().to_string(), why });
                    deleted.delete_cf(&of_family, &key);
                }
                if repair {
                    db.write(deleted).map_err(|error| database.wrong(error.as_ref()))?;
                }
            }
            Ok(damage)
        })
    }

    /// Brings the files into order: what was deleted gives its place back.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn compact(&self, mut progress: impl FnMut(&str)) -> Result<(), StoreError> {
        self.with(|_, db| {
            for family in Family::ALL {
                progress(family.name());
                db.compact_range_cf(&column(db, family)?, None::<&[u8]>, None::<&[u8]>);
            }
            Ok(())
        })
    }

    /// Writes a line of JSON for each row.
    ///
    /// # Errors
    /// It cannot be read, or `to` not be written.
    pub fn export(&self, to: &mut impl Write) -> Result<u64, StoreError> {
        self.with(|database, db| {
            let mut count = 0;
            let clock = database.clock_row_of(db)?.and_then(|row| ClockRow::take(&row));
            for family in Family::ALL {
                for row in rows(database, db, family)? {
                    let (key, value) = row?;
                    let line = Line {
                        family: family.name().into(),
                        key: hex(&key),
                        value: hex(&value),
                        about: about(family, &key, &value, clock.as_ref()),
                    };
                    serde_json::to_writer(&mut *to, &line).map_err(|error| StoreError(error.to_string()))?;
                    to.write_all(b"\n").map_err(io)?;
                    count += 1;
                }
            }
            Ok(count)
        })
    }

    /// Puts the rows of an export.
    ///
    /// # Errors
    /// A line is none of an export, or it cannot be written.
    pub fn import(&self, from: &mut impl BufRead) -> Result<u64, StoreError> {
        self.with(|database, db| {
            let mut batch = WriteBatch::default();
            let mut count = 0;
            for (at, line) in from.lines().enumerate() {
                let line = line.map_err(io)?;
                let wrong = |why: &str| StoreError(format!("line {}: {why}", at + 1));
                let line: Line = serde_json::from_str(&line).map_err(|error| wrong(&error.to_string()))?;
                let family = Family::ALL.into_iter().find(|family| family.name() == line.family);
                let family = family.ok_or_else(|| wrong(&format!("there is no family {:?}", line.family)))?;
                let bytes = |text: &str| unhex(text).ok_or_else(|| wrong("not hexadecimal"));
                let (key, value) = (bytes(&line.key)?, bytes(&line.value)?);
                // Times in the rows mean what the clock says. The schema is that of this broker.
                if family != Family::Meta || key == CLOCK_KEY {
                    batch.put_cf(&column(db, family)?, key, value);
                    count += 1;
                }
                if batch.len() >= IMPORT_ROWS {
                    db.write(std::mem::take(&mut batch)).map_err(|error| database.wrong(error.as_ref()))?;
                }
            }
            let mut synced = WriteOptions::default();
            synced.set_sync(true);
            db.write_opt(batch, &synced).map_err(|error| database.wrong(error.as_ref()))?;
            Ok(count)
        })
    }

    /// Copies everything to a new folder, by links to the same files where that is possible.
    ///
    /// # Errors
    /// The folder exists, or cannot be made.
    pub fn backup(&self, to: &Path) -> Result<(), StoreError> {
        backup(&self.0, to)
    }
}

impl RocksStore {
    /// Copies what is kept by now to a new folder, while the broker serves.
    ///
    /// # Errors
    /// The folder exists, or cannot be made.
    pub fn backup(&self, to: &Path) -> Result<(), StoreError> {
        backup(&self.database, to)
    }
}

fn backup(database: &Database, to: &Path) -> Result<(), StoreError> {
    let held = database.held();
    let db = held.db().ok_or_else(|| database.wrong("it is not open"))?;
    let failed = |error: rocksdb::Error| StoreError(format!("backup to {}: {error}", to.display()));
    // What a power loss would take from the store must not be missing from its copy.
    db.flush_wal(true).map_err(failed)?;
    Checkpoint::new(db).and_then(|checkpoint| checkpoint.create_checkpoint(to)).map_err(failed)?;
    let io_failed = |error: std::io::Error| StoreError(format!("backup to {}: {error}", to.display()));
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o700)).map_err(io_failed)?;
    private_files(to).map_err(io_failed)?;
    wasmqtt_files::sync_tree(to).map_err(io_failed)
}

fn fault(family: Family, key: &[u8], value: &[u8], sessions: &hashbrown::HashSet<u64>) -> Option<&'static str> {
    let owner = || Take(key).u64().is_some_and(|session| sessions.contains(&session));
    let is_good = rows::is_readable(family, key, value);
    let of_sessions = [Family::Subscription, Family::Replay, Family::Inflight, Family::Received];
    let belongs = !of_sessions.contains(&family) || owner();
    match (is_good, belongs) {
        (false, _) => Some("it cannot be read"),
        (true, false) => Some("its Session does not exist"),
        (true, true) => None,
    }
}

/// What a row is about, in words.
fn about(family: Family, key: &[u8], value: &[u8], clock: Option<&ClockRow>) -> Option<String> {
    // In the store there is broker time.
    let when = |what: &str, at_ms: Option<u64>| {
        at_ms.map_or_else(String::new, |at| format!(", {what} {}", utc(clock.map_or(at, |clock| clock.wall_of(at)))))
    };
    let session = || Take(key).u64().unwrap_or(0);
    Some(match family {
        Family::Meta if key == CLOCK_KEY => format!("clock{}", when("written", clock.map(|clock| clock.broker_ms))),
        Family::Meta => return None,
        Family::KeyValue => {
            let mut rest = Take(key);
            let plugin = rest.text()?;
            let (bucket, key) = rows::take_value_key(rest.0)?;
            format!("plugin {plugin}, bucket {bucket}: {key}")
        }
        Family::Session => {
            let row = rows::take_session(value)?;
            format!("Session of {}{}", row.client.client_id, when("left", row.closed_at_ms))
        }
        Family::Subscription | Family::Replay => {
            format!("Session {}: {}", session(), std::str::from_utf8(key.get(8..)?).ok()?)
        }
        Family::Message => {
            let row = MessageRow::parse(value)?;
            let rows::Receivers { to, payload, .. } = row.receivers()?;
            let until = when("expires", row.expires_at_ms());
            format!("message to {} for {} Sessions, {} bytes{until}", row.topic(), to.len(), payload.len())
        }
        Family::Retained => {
            let rows::RetainedRow { message, .. } = rows::take_retained(key, value)?;
            let until = when("expires", message.expires_at_ms);
            format!("retained on {}, {} bytes{until}", message.topic, message.payload.len())
        }
        Family::Feed => {
            let row = rows::take_feed(value)?;
            format!("message to {} for plugins {}", row.message.topic, row.plugins.join(", "))
        }
        Family::Ban => {
            let row = rows::take_ban(key, value)?;
            format!("{}{}", std::str::from_utf8(key).ok()?, when("until", Some(row.until_ms)))
        }
        Family::Done | Family::Inflight | Family::Received => format!("Session {}", session()),
    })
}

/// Milliseconds since 1970, as `2026-11-28T17:00:00Z`.
fn utc(ms: u64) -> String {
    let (days, second) = (ms / 86_400_000, ms / 1000 % 86_400);
    // The calendar repeats itself every 400 years; a year that begins in March has its leap day at the end.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (0, month + 3) } else { (1, month - 9) };
    let year = era * 400 + year_of_era + year;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let pair = |pair: &[u8]| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?);
    text.as_bytes().chunks(2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn instants_are_written_as_people_do() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_873_530, "2026-11-28T13:45:30Z"),
            (4_102_444_799, "2099-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(seconds * 1000), text);
        }
    }
}
