//! Answers for the entry `driver_keys` under a coverage-guided fuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devsplice_fuzz::driver_keys(bytes));
