//! Pre-tokens of any bytes: see `bodies::pieces`.
#![no_main]

#[path = "../src/bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::pieces(data));
