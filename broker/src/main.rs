//! The `wasmqtt` binary.
fn main() {}
