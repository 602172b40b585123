//! One client's protocol state, across Network Connections. MQTT 5.0 §4.1.
//!
//! Uses `codec`, `topic` and the message types of `router`. Knows nothing of sockets, other Sessions, storage or
//! plugins: what it wants from them it returns as an [`Event`]. Time comes in as milliseconds of the broker's clock.

mod delivery;
mod inflight;
mod link;
mod outbound;
mod outbox;
mod queue;
mod reading;
mod replay;
mod state;
mod steps;

pub use delivery::{Delivery, FrameCache, Incoming};
pub use inflight::Inflight;
pub use link::{Link, LinkLimits, ServerLimits};
pub use outbound::{Delivered, Wish};
pub use outbox::Outbox;
pub use queue::{Parked, queued_bytes};
pub use replay::Replay;
pub use state::{Event, Fault, QueuePolicy, Session, WillMessage, subscription_bytes};
pub use steps::{Kept, Step};
