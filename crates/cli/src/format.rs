//! Answers for `devsplice format`: fresh metadata for a layer that keeps any below.

use devsplice_core::Result;
use devsplice_spec::Plan;

use crate::args::Format;
use crate::assemble::{self, CATALOG};
use crate::say;

/// Writes the metadata and says what was made.
///
/// # Errors
/// If the stack does not parse, its top keeps no metadata, or something below cannot be written.
pub fn run(format: &Format) -> Result<()> {
    let plan = Plan::load(&format.stack, &CATALOG)?;
    say!("{}", assemble::format(&plan, format.force)?);
    Ok(())
}
