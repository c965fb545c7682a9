//! Answers for the entry `nbd_server` under a coverage-guided fuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devsplice_fuzz::nbd_server(bytes));
