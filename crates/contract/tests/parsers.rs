//! Answers for every parser over the fuzzer's seeds and what chance makes of them: the same entry
//! functions that a coverage-guided fuzzer runs, so many times each, from fixed seeds.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/lib.rs"]
mod entries;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use devsplice_contract::rng::Rng;

/// Variants of each seed.
const VARIANTS: usize = 3000;
/// Words that parsers look for, from which a variant may get one.
const WORDS: &[&str] = &[
    "(",
    ")",
    ",",
    "=",
    "\"",
    "\\",
    "'",
    "[",
    "]",
    "\n",
    "0",
    "18446744073709551615",
    "64k",
    "-1",
    "0x",
    "file",
    "mem",
    "stripe",
    "linear",
    "offset",
    "size",
    "below",
    "driver",
    "stack",
];

fn mutate(seed: &[u8], others: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let below = |rng: &mut Rng, len: usize| rng.below(len.max(1) as u64) as usize;
    for _ in 0..=rng.below(4) {
        let at = below(rng, bytes.len());
        match rng.below(8) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << rng.below(8),
            1 if !bytes.is_empty() => bytes[at] = rng.next().to_le_bytes()[3],
            2 => bytes.truncate(at),
            3 => {
                let word = WORDS[below(rng, WORDS.len())].bytes();
                bytes.splice(at..at, word);
            }
            4 => {
                let other = &others[below(rng, others.len())];
                let from = below(rng, other.len());
                bytes.splice(at.., other[from..].iter().copied());
            }
            5 => {
                // A number at one of the ends of its range.
                let value = [0, 1, u64::MAX, i64::MAX as u64, u64::from(u32::MAX)];
                let value = value[below(rng, value.len())].to_le_bytes();
                let len = [1, 2, 4, 8][below(rng, 4)].min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&value[..len]);
            }
            6 => {
                let to = (at + below(rng, 40)).min(bytes.len());
                let twice = bytes[at..to].to_vec();
                bytes.splice(at..at, twice);
            }
            _ => {
                let to = (at + below(rng, 20)).min(bytes.len());
                bytes.drain(at..to);
            }
        }
    }
    bytes
}

/// Runs an entry over its seeds and their variants; the bytes that break it are in the message.
fn run(name: &str, entry: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|at| at.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<_> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(!seeds.is_empty(), "no seeds in {}", dir.display());
    let mut rng = Rng::new(1);
    for seed in &seeds {
        for variant in 0..VARIANTS {
            let bytes = if variant == 0 { seed.clone() } else { mutate(seed, &seeds, &mut rng) };
            let done = catch_unwind(AssertUnwindSafe(|| entry(&bytes)));
            assert!(done.is_ok(), "{name} breaks on {:?}", String::from_utf8_lossy(&bytes));
        }
    }
}

macro_rules! entries {
    ($($name:ident: $sentence:ident),* $(,)?) => { $(
        #[test]
        fn $sentence() {
            run(stringify!($name), entries::$name);
        }
    )* };
}

entries! {
    stack_line: any_expression_is_a_plan_that_reads_back_or_an_error,
    stack_toml: any_document_is_a_plan_that_reads_back_or_an_error,
    numbers: any_number_is_what_it_says_or_an_error,
    driver_keys: any_keys_make_a_layer_that_stays_inside_or_an_error,
    mbr: any_boot_sector_has_partitions_inside_the_disk_or_is_an_error,
    gpt: any_partition_table_has_partitions_inside_the_disk_or_is_an_error,
    nbd_server: any_client_of_nbd_is_served_within_the_limits_or_cut_off,
    nbd_client: any_server_of_nbd_is_believed_within_the_limits_or_left,
    nbd_answers: any_answers_of_nbd_stay_within_what_was_asked_or_are_refused,
    nbd_uri: any_address_of_nbd_reads_back_or_is_an_error,
    psk_file: any_file_of_keys_reads_back_or_is_an_error,
    fuse_wire: any_message_is_a_request_inside_the_file_or_an_error,
}

/// The seeds are accepted by what they are seeds of: variants of refused ones would show little.
#[test]
fn seeds_open_partitions() {
    use devsplice_core::StackBuilder;
    use devsplice_core::prelude::*;
    let image =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/mbr/logical"));
    let image = image.unwrap();
    for (number, size) in [("1", 100 * 512), ("5", 10 * 512), ("6", 4 * 512)] {
        let driver = &devsplice_layers::partition::DRIVER;
        let given = [("number".to_owned(), number.to_owned())];
        let layer = (driver.make)(&Args::new("partition", driver.keys, &given).unwrap()).unwrap();
        let mut builder = StackBuilder::new();
        let (disk, _) = builder.backend("disk", Limits::ideal(1 << 20)).unwrap();
        let mut reader = |_, at: u64, into: &mut [u8]| {
            for (place, byte) in (at..).zip(into) {
                *byte = image.get(place as usize).copied().unwrap_or(0);
            }
            Ok(())
        };
        let top = builder.layer("partition", layer, &[disk], &mut reader).unwrap();
        assert_eq!(builder.limits(top).size, size);
    }
}
