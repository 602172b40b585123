//! RocksDB: how it is opened, and opened again after it failed.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use rocksdb::{
    BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode,
    DBWithThreadMode, LogLevel, MultiThreaded, Options,
};
use wasmqtt_protocol::ports::StoreError;

use super::rows::{Family, Take};
use super::{SCHEMA, StoreConfig};

pub(super) type Db = DBWithThreadMode<MultiThreaded>;
pub(super) type Column<'a> = std::sync::Arc<BoundColumnFamily<'a>>;

const SCHEMA_KEY: &[u8] = b"schema";
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
    /// Opens it, makes it, or brings an older one up to date.
    pub(super) fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        let cache = Cache::new_lru_cache(config.cache_mib as usize * MIB);
        let database = Self { config: config.clone(), cache, db: RwLock::new(None) };
        std::fs::create_dir_all(&config.path).map_err(|error| database.wrong(&error.to_string()))?;
        let db = database.open_db()?;
        database.check_schema(&db)?;
        *database.db.write().unwrap_or_else(PoisonError::into_inner) = Some(db);
        Ok(database)
    }

    pub(super) fn held(&self) -> Held<'_> {
        Held(self.db.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// RocksDB refuses everything after a failed write: it is closed and opened.
    pub(super) fn reopen(&self) -> Result<(), StoreError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *db = None;
        *db = Some(self.open_db()?);
        Ok(())
    }

    pub(super) fn wrong(&self, why: &str) -> StoreError {
        let path = self.config.path.display();
        if why.contains("lock") || why.contains("LOCK") {
            return StoreError(format!("store {path}: another broker uses it ({why})"));
        }
        StoreError(format!("store {path}: {why}"))
    }

    fn open_db(&self) -> Result<Db, StoreError> {
        let families = Family::ALL.map(|family| ColumnFamilyDescriptor::new(family.name(), self.family(family)));
        Db::open_cf_descriptors(&self.options(), &self.config.path, families)
            .map_err(|error| self.wrong(error.as_ref()))
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
            // Rows of the first schema are read as they are; families that it had not are made when it is opened.
            Some(Some(1)) => {
                db.put_cf(&meta, SCHEMA_KEY, SCHEMA.to_be_bytes()).map_err(|error| self.wrong(error.as_ref()))
            }
            Some(Some(newer)) if newer > SCHEMA => Err(self.wrong(&format!(
                "it has schema {newer}, and this broker knows up to {SCHEMA}: it was written by a newer one; start that, \
                 or set [store] path to another folder"
            ))),
            Some(_) => Err(self.wrong("its schema number is damaged")),
            None => {
                db.put_cf(&meta, SCHEMA_KEY, SCHEMA.to_be_bytes()).map_err(|error| self.wrong(error.as_ref()))
            }
        }
    }
}
