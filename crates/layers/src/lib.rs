//! Answers for the drivers that say where data goes: one file each, none of which can do I/O.
//!
//! Writing another one: copy `linear.rs`, add it to [`DRIVERS`]. `testing.rs` opens a layer over
//! made-up devices, so its tests are tables of request and answer.
#![forbid(unsafe_code)]

use devsplice_core::Driver;
use devsplice_core::layer::Format;

pub mod bottom;
pub mod concat;
pub mod delay;
pub mod error;
pub mod flaky;
pub mod linear;
pub mod log;
pub mod mirror;
pub mod null;
pub mod partition;
mod passes;
pub mod stats;
pub mod stripe;
#[cfg(test)]
mod testing;
pub mod throttle;
pub mod verify;
pub mod zero;
pub mod zoned;

/// All of them, in the order in which help texts list them.
pub const DRIVERS: &[Driver] = &[
    linear::DRIVER,
    concat::DRIVER,
    stripe::DRIVER,
    mirror::DRIVER,
    partition::DRIVER,
    delay::DRIVER,
    error::DRIVER,
    throttle::DRIVER,
    stats::DRIVER,
    verify::DRIVER,
    flaky::DRIVER,
    log::DRIVER,
    null::DRIVER,
    zero::DRIVER,
    zoned::DRIVER,
];

/// The driver of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Driver> {
    DRIVERS.iter().find(|driver| driver.name == name)
}

/// How fresh metadata is written for a driver, if it keeps any below.
#[must_use]
pub fn format_of(name: &str) -> Option<Format> {
    match name {
        "mirror" => Some(mirror::format),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_driver_is_found_under_its_own_name_only() {
        for (place, driver) in DRIVERS.iter().enumerate() {
            let first = DRIVERS.iter().position(|other| other.name == driver.name);
            assert_eq!(first, Some(place), "{} is listed twice", driver.name);
            assert!(find(driver.name).is_some());
        }
        assert!(find("Linear").is_none() && find("").is_none());
    }

    #[test]
    fn no_key_is_a_word_of_the_stack_file() {
        // A stack file writes a device's keys beside `driver` and `below`.
        for key in DRIVERS.iter().flat_map(|driver| driver.keys) {
            assert!(key.name != "driver" && key.name != "below", "{}", key.name);
        }
    }
}
