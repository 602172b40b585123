//! The MQTT protocol core: codec → topic → access, router → session → ports. MQTT 3.1, 3.1.1 and 5.0.
//!
//! No I/O, no clock, no async runtime, no Wasm: bytes and instants go in, packets and events come out.
#![forbid(unsafe_code)]

pub mod access;
pub mod codec;
pub mod ports;
pub mod router;
pub mod session;
pub mod text;
pub mod topic;
