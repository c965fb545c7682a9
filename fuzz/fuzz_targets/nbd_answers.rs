//! Answers for the entry `nbd_answers` under a coverage-guided fuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devsplice_fuzz::nbd_answers(bytes));
