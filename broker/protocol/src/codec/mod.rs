//! Packets of MQTT 3.1, 3.1.1 and 5.0, from bytes and to bytes. One codec; the version is an argument.
//!
//! Decoding borrows from the buffer and copies nothing; what is kept is copied by whoever keeps it.

mod decode;
mod encode;
mod packet;
mod property;
mod reason;

pub use decode::{DecodeError, Frame, Limits, decode, frame};
pub use encode::{PublishHead, encode, encode_publish_head};
pub use packet::*;
pub use property::{PublishProperties, UserProperties};
pub use reason::ReasonCode;
