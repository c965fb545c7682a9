//! Answers for the entry `nbd_uri` under a coverage-guided fuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devsplice_fuzz::nbd_uri(bytes));
