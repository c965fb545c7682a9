//! Answers for manual pages and completion scripts, from the one definition of the command line.

use std::io::Write;

use clap::CommandFactory;
use devsplice_core::{Error, Result};

use crate::args::{Completions, Man, Options};

/// Writes devsplice.1 and one page per command.
///
/// # Errors
/// If a file cannot be written.
pub fn man(man: &Man) -> Result<()> {
    clap_mangen::generate_to(Options::command(), &man.dir)
        .map_err(|error| Error::os(man.dir.display().to_string(), &error))?;
    Ok(())
}

/// Prints the script.
///
/// # Errors
/// None: a reader that has gone is no error.
pub fn completions(completions: &Completions) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(completions.shell, &mut Options::command(), "devsplice", &mut text);
    let _ = std::io::stdout().write_all(&text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_that_names_its_options() {
        let dir = std::env::temp_dir().join(format!("devsplice-man-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        man(&Man { dir: dir.clone() }).unwrap();
        let add = std::fs::read_to_string(dir.join("devsplice-add.1")).unwrap();
        assert!(add.contains("\\-\\-data\\-path") && add.contains("\\-\\-read\\-only"));
        for page in ["devsplice", "devsplice-del", "devsplice-explain"] {
            assert!(dir.join(format!("{page}.1")).exists(), "{page}");
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Options::command().debug_assert();
    }
}
