//! Rows of the store, keys and values, as a damaged disk might give them back: read or refused, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

mod store;

fuzz_target!(|data: &[u8]| {
    let [family, key_len, rest @ ..] = data else { return };
    let (key, row) = rest.split_at(usize::from(*key_len).min(rest.len()));
    store::rows::read_any(usize::from(*family), key, row);
});
