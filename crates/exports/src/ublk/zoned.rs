//! Answers for whether a device with zones can be made, and served, as it is asked for.

use devsplice_core::{Error, ErrorKind, Result, Stack};

use super::uapi::F_ZONED;
use super::{DataPath, Extra, Options};

/// The feature flag that a stack's zones need, if it has any.
///
/// # Errors
/// Without the driver's or io_uring's support, or together with what has none for zones.
pub(super) fn flags(
    stack: &Stack,
    (options, extra): (&Options, &Extra),
    path: DataPath,
    features: u64,
) -> Result<u64> {
    if stack.zones().is_none() {
        return Ok(0);
    }
    let invalid = |what: &str, next: &str| {
        Err(Error::invalid(what, "does not go with a device of zones").next(next))
    };
    if path == DataPath::Copy {
        return invalid("the copy path", "--data-path auto");
    }
    if options.batch == Some(true) || options.threads > options.queues.max(1) {
        return invalid("serving in batches", "--batch off, and no more threads than queues");
    }
    if options.read_only {
        return invalid("--read-only", "leave it out");
    }
    if extra.integrity.is_some() {
        return invalid("integrity data", "leave it out");
    }
    if features & F_ZONED == 0 {
        let reason = "this kernel's ublk has none (6.6, with CONFIG_BLK_DEV_ZONED)";
        return Err(Error::new(ErrorKind::Unsupported, "zones", reason));
    }
    let can_cut = devsplice_uring::probe::features()?
        .operations
        .iter()
        .any(|(name, is_there)| *is_there && *name == devsplice_uring::probe::CUTTING);
    if !can_cut {
        let reason = "this kernel's io_uring cannot cut files, as resetting a zone does (6.9)";
        return Err(Error::new(ErrorKind::Unsupported, "zones", reason));
    }
    Ok(F_ZONED)
}
