//! The files themselves: the crate they belong to brings RocksDB, which takes ten minutes to build and no part in this.
#![allow(dead_code, unreachable_pub)]

#[path = "../../../../broker/store/src/rows.rs"]
pub mod rows;
