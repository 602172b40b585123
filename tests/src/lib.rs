//! What integration tests share: the real broker in a process of its own, and a client that can also misbehave.
//!
//! A test starts a [`Broker`], connects [`Client`]s with [`Options`], and says which [`Got`] must come back. Packets the
//! codec would not write are made with [`raw`].
#![allow(missing_docs, reason = "nothing but tests use it, and the names are those of the standard")]

mod broker; // the process
mod client; // one Network Connection
pub mod clock; // one that jumps
pub mod disk; // one that forgets, one that is full
pub mod lasting; // clients that outlive the broker
mod packet; // packets that own their data
pub mod raw; // packets by hand
pub mod traffic; // load in the background

pub use broker::{Broker, wasmqtt};
pub use client::Client;
pub use packet::{Connack, Got, Message, Options, Will};
pub use wasmqtt_protocol::codec::{RetainHandling, SubscribeOptions, Version};

/// The versions most of the standard is the same for.
pub const BOTH: [Version; 2] = [Version::V311, Version::V5];
/// With 3.1.
pub const ALL: [Version; 3] = [Version::V31, Version::V311, Version::V5];

/// Options of a plain subscription.
pub fn at_most(qos: u8) -> SubscribeOptions {
    let qos = wasmqtt_protocol::codec::Qos::from_bits(qos).expect("QoS");
    SubscribeOptions { qos, ..SubscribeOptions::default() }
}
