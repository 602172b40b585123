//! The files themselves: the crate they belong to brings RocksDB, which takes ten minutes to build and no part in this.
#![allow(dead_code, unreachable_pub)]

#[path = "../../../../broker/server/src/store/clock_row.rs"]
mod clock_row;
#[path = "../../../../broker/server/src/store/rows.rs"]
pub mod rows;
