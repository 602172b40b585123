//! Packets of MQTT 3.1, 3.1.1 and 5.0, from bytes and to bytes. One codec; the version is an argument.
//!
//! Decoding borrows from the buffer and copies nothing; what is kept is copied by whoever keeps it.

mod decode;
mod encode;
mod error;
mod packet;
mod property; // what PUBLISH and the Will carry; User Properties
mod reason;
mod wire; // integers, strings and single properties

pub use decode::{Frame, Limits, answer_version, decode, frame};
pub use encode::{PublishHead, encode, encode_publish_head, publish_len};
pub use error::DecodeError;
pub use packet::*;
pub use property::{PublishProperties, PublishPropertiesBuilder, UserProperties};
pub use reason::ReasonCode;
