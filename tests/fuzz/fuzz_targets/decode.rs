//! Bytes from a peer: no panic; what is taken survives encode and decode; a frame ends where it says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wasmqtt_protocol::codec::{Limits, Version, answer_version, decode, encode, frame};

fuzz_target!(|input: (u8, &[u8])| {
    let (pick, mut bytes) = input;
    let version = [Version::V31, Version::V311, Version::V5][usize::from(pick % 3)];
    let limits = Limits {
        packet_bytes_max: 1 << 20,
    };
    let _ = answer_version(bytes);
    while let Ok(Some(frame)) = frame(bytes, &limits) {
        assert!(frame.header_len <= frame.total_len && frame.total_len <= 1 << 20);
        let Some((packet, rest)) = bytes.split_at_checked(frame.total_len) else {
            return;
        };
        if let Ok(taken) = decode(version, packet) {
            let mut again = Vec::new();
            encode(version, &taken, &mut again);
            assert_eq!(decode(version, &again).as_ref(), Ok(&taken));
        }
        bytes = rest;
    }
});
