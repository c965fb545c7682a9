//! Answers for the entry `fuse_wire` under a coverage-guided fuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devsplice_fuzz::fuse_wire(bytes));
