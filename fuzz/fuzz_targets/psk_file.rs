//! Answers for the entry `psk_file` under a coverage-guided fuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devsplice_fuzz::psk_file(bytes));
