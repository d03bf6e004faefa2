//! Frames of event channels' nodes and their registry: what is understood is written as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| xbee_kecho::probe(bytes));
