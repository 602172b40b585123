//! RocksDB: how it is opened, and opened again after it failed.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use rocksdb::{
    BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode,
    DBWithThreadMode, ErrorKind, LogLevel, MultiThreaded, Options,
};
use tracing::warn;
use wasmqtt_protocol::ports::StoreError;

use super::rows::{Family, Take};
use super::{SCHEMA, StoreConfig};

pub(super) type Db = DBWithThreadMode<MultiThreaded>;
pub(super) type Column<'a> = std::sync::Arc<BoundColumnFamily<'a>>;

const SCHEMA_KEY: &[u8] = b"schema";
/// Row with the broker's clock.
pub(super) const CLOCK_KEY: &[u8] = b"clock";
/// File with which the disk is tried before RocksDB is, and its bytes: more than RocksDB writes to open an empty store.
const PROBE: &str = "PROBE";
const PROBE_BYTES: usize = 256 << 10;
const PROBE_BYTES_MAX: usize = 16 << 20;
/// Files held open.
const OPEN_FILES_MAX: i32 = 512;
/// Files of RocksDB's own log that are kept.
const LOG_FILES_MAX: usize = 4;
const MIB: usize = 1 << 20;

/// An open database; for a moment none, while it is opened again.
pub(super) struct Database {
    config: StoreConfig,
    cache: Cache,
    db: RwLock<Option<Db>>,
    /// Why it is open for reading only: the disk is full or broken.
    read_only: Mutex<Option<String>>,
}

/// The database, as long as this is held.
pub(super) struct Held<'a>(RwLockReadGuard<'a, Option<Db>>);

impl Held<'_> {
    /// `None`: it could not be opened again so far.
    pub(super) fn db(&self) -> Option<&Db> {
        self.0.as_ref()
    }
}

pub(super) fn column(db: &Db, family: Family) -> Result<Column<'_>, StoreError> {
    db.cf_handle(family.name()).ok_or_else(|| StoreError(format!("column family {} is missing", family.name())))
}

impl Database {
    /// Opens it, makes it, or brings an older one up to date. If the disk takes nothing, what is there can still be read.
    pub(super) fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        let cache = Cache::new_lru_cache(config.cache_mib as usize * MIB);
        let (db, read_only) = (RwLock::new(None), Mutex::default());
        let database = Self { config: config.clone(), cache, db, read_only };
        let is_there = config.path.join("CURRENT").exists();
        if !is_there {
            wasmqtt_files::make_private_folder(&config.path).map_err(|error| database.wrong(&error.to_string()))?;
        }
        let db = match database.open_db() {
            Ok(db) => db,
            Err(why) if is_there && why.kind() == ErrorKind::IOError && !is_lock(why.as_ref()) => {
                let db = database.open_read_only().map_err(|error| database.wrong(error.as_ref()))?;
                database.set_read_only(Some(why.to_string()));
                db
            }
            Err(why) => return Err(database.wrong(why.as_ref())),
        };
        database.check_schema(&db)?;
        if let Err(error) = database.keep_private() {
            warn!(path = %config.path.display(), %error, "cannot keep others from reading the store");
        }
        *database.db.write().unwrap_or_else(PoisonError::into_inner) = Some(db);
        Ok(database)
    }

    /// For the owner alone: payloads are in there. RocksDB makes files as the umask has it, but nobody else gets into the
    /// folder.
    fn keep_private(&self) -> io::Result<()> {
        fs::set_permissions(&self.config.path, Permissions::from_mode(0o700))?;
        private_files(&self.config.path)
    }

    pub(super) fn held(&self) -> Held<'_> {
        Held(self.db.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// `None`: it can be written.
    pub(super) fn read_only_because(&self) -> Option<StoreError> {
        let why = self.read_only.lock().unwrap_or_else(PoisonError::into_inner);
        why.as_ref().map(|why| self.wrong(why))
    }

    fn set_read_only(&self, why: Option<String>) {
        *self.read_only.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// RocksDB refuses everything after a failed write: it is closed and opened. If that fails, it is opened for reading.
    /// `bytes`: what is to be written then.
    pub(super) fn reopen(&self, bytes: usize) -> Result<(), StoreError> {
        self.probe(bytes).map_err(|error| self.wrong(&error.to_string()))?;
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *db = None;
        let opened = self.open_db().and_then(|opened| Self::bring_up_to_date(&opened).map(|()| opened));
        match opened {
            Ok(opened) => {
                *db = Some(opened);
                self.set_read_only(None);
                Ok(())
            }
            Err(why) => {
                *db = self.open_read_only().ok();
                self.set_read_only(Some(why.to_string()));
                Err(self.wrong(why.as_ref()))
            }
        }
    }

    /// Whether the disk takes anything: to open RocksDB in vain costs much, and nothing can be read meanwhile.
    fn probe(&self, bytes: usize) -> io::Result<()> {
        let path = self.config.path.join(PROBE);
        let zeros = vec![0; (PROBE_BYTES + bytes).min(PROBE_BYTES_MAX)];
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&zeros)?;
            file.sync_data()
        });
        fs::remove_file(&path).or_else(|error| if written.is_err() { Ok(()) } else { Err(error) })?;
        written
    }

    /// See [`wasmqtt_protocol::ports::Store::clock_row`].
    pub(super) fn clock_row(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let held = self.held();
        let Some(db) = held.db() else { return Err(self.wrong("it is not open")) };
        self.clock_row_of(db)
    }

    pub(super) fn clock_row_of(&self, db: &Db) -> Result<Option<Vec<u8>>, StoreError> {
        db.get_cf(&column(db, Family::Meta)?, CLOCK_KEY).map_err(|error| self.wrong(error.as_ref()))
    }

    pub(super) fn wrong(&self, why: &str) -> StoreError {
        let path = self.config.path.display();
        if is_lock(why) {
            return StoreError(format!("store {path}: another broker uses it ({why})"));
        }
        StoreError(format!("store {path}: {why}"))
    }

    fn families(&self) -> [ColumnFamilyDescriptor; Family::ALL.len()] {
        Family::ALL.map(|family| ColumnFamilyDescriptor::new(family.name(), self.family(family)))
    }

    fn open_db(&self) -> Result<Db, rocksdb::Error> {
        Db::open_cf_descriptors(&self.options(), &self.config.path, self.families())
    }

    /// Writes nothing.
    fn open_read_only(&self) -> Result<Db, rocksdb::Error> {
        let mut options = self.options();
        options.create_if_missing(false);
        options.create_missing_column_families(false);
        Db::open_cf_descriptors_read_only(&options, &self.config.path, self.families(), false)
    }

    fn options(&self) -> Options {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_open_files(OPEN_FILES_MAX);
        options.set_max_background_jobs(2);
        options.set_db_write_buffer_size(self.config.write_buffer_mib as usize * MIB);
        options.set_max_total_wal_size(2 * (self.config.write_buffer_mib as usize * MIB) as u64);
        // What was not synced may be cut off by a crash, and what comes before is whole.
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_keep_log_file_num(LOG_FILES_MAX);
        options.set_log_level(LogLevel::Warn);
        options
    }

    fn family(&self, family: Family) -> Options {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&self.cache);
        blocks.set_cache_index_and_filter_blocks(true);
        blocks.set_bloom_filter(10.0, false);
        let mut options = Options::default();
        options.set_block_based_table_factory(&blocks);
        options.set_write_buffer_size((self.config.write_buffer_mib as usize * MIB / 2).max(MIB));
        if matches!(family, Family::Message | Family::Retained | Family::Session) {
            // Most of what is young is deleted before it is merged.
            options.set_compression_per_level(&[DBCompressionType::None, DBCompressionType::Lz4]);
        } else {
            options.set_compression_type(DBCompressionType::None);
        }
        options
    }

    fn check_schema(&self, db: &Db) -> Result<(), StoreError> {
        let meta = column(db, Family::Meta)?;
        let found = db.get_cf(&meta, SCHEMA_KEY).map_err(|error| self.wrong(error.as_ref()))?;
        match found.map(|row| Take(&row).u32()) {
            Some(Some(SCHEMA)) => Ok(()),
            Some(Some(newer)) if newer > SCHEMA => Err(self.wrong(&format!(
                "it has schema {newer}, and this broker knows up to {SCHEMA}: it was written by a newer one; start that, \
                 or set [store] path to another folder"
            ))),
            // That comes when it is opened again for writing.
            Some(Some(1)) | None if self.read_only_because().is_some() => Ok(()),
            Some(Some(1)) | None => Self::bring_up_to_date(db).map_err(|error| self.wrong(error.as_ref())),
            Some(_) => Err(self.wrong("its schema number is damaged")),
        }
    }

    /// Rows of the first schema are read as they are; families that it had not are made when it is opened.
    fn bring_up_to_date(db: &Db) -> Result<(), rocksdb::Error> {
        let Some(meta) = db.cf_handle(Family::Meta.name()) else { return Ok(()) };
        let number = SCHEMA.to_be_bytes();
        match db.get_cf(&meta, SCHEMA_KEY)? {
            Some(found) if found == number => Ok(()),
            _ => db.put_cf(&meta, SCHEMA_KEY, number),
        }
    }
}

/// RocksDB names the file with which it keeps others out.
fn is_lock(why: &str) -> bool {
    why.contains("/LOCK:")
}

/// Takes the files of a folder from everybody but their owner.
pub(super) fn private_files(folder: &std::path::Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            match fs::set_permissions(entry.path(), Permissions::from_mode(0o600)) {
                // RocksDB deletes files at any time.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}
